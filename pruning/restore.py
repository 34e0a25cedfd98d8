"""RESTORE: merged tokens keep their positions, and attention counts them as what they stand for."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlm_prune.kernels.pairwise_cosine import pairwise_cosine
from vlm_prune.pruning.base import PositionRule
from vlm_prune.pruning.compose import MethodWrapper, separately
from vlm_prune.pruning.select import others, sums_by_nearest
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.encoded import Images
from vlm_prune.vlm.families import Family, Need
from vlm_prune.vlm.layer_pruning import NO_BIAS
from vlm_prune.vlm.prompt_pruning import BeforeModel
from vlm_prune.vlm.tokens import Kept, VisionTokens, take, top


@dataclass
class Restore(MethodWrapper):
    """Any method before the language model at half the budget; the other half are anchors into which
    all other tokens are averaged: `divprune+restore`.

    https://arxiv.org/abs/2606.01711

    Anchors have a large product of density, the sum of their cosines to all others, and of
    distinctness, 1 - the largest cosine to a denser one. An average stands at the median of its
    group's tokens, of two middle ones at the first, and positions keep their gaps.

    Attention adds log s, the number of tokens that a key stands for, and where the prompt is read
    log(2 - D), D the mean cosine of the angles between the rotations of query and key, which is
    RoPE's decay over distance, with rows and columns too. The first layer counts all tokens of an
    image as equally many. Prompts that lose nothing, and keys of earlier turns, get no such distance.

    The bias is a mask of its own for each prompt: SDPA and eager attention take it, FlashAttention
    and FlexAttention do not, and are refused.

    Args:
        method: chooses what is kept as it is; its own budget, positions and seed are replaced.
        anchors: their share of the budget, above 0 and up to 1.
    """

    anchors: float = 0.5
    paper: ClassVar[str] = "https://arxiv.org/abs/2606.01711"
    authors_positions: ClassVar[PositionRule] = "original"
    changes_attention: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.anchors <= 1:
            raise InputError(f"anchors {self.anchors} is out of range; give a share in (0, 1]")

    @property
    def needs(self) -> frozenset[Need]:
        # the bias is added to logits, which linear attention has none of
        return super().needs | {"softmax attention in every decoder layer"}

    def before_model(self, family: Family, vision: Images | None) -> BeforeModel:
        if family.decoder.config._attn_implementation not in ("sdpa", "eager"):
            raise InputError(NO_BIAS)
        return super().before_model(family, vision)

    def reduce(self, vision: VisionTokens) -> Kept:
        k, tokens = self.count(vision), vision.projected
        total = tokens.shape[1]
        if k == total:
            return Kept.at(tokens, torch.arange(k, device=tokens.device).expand(len(tokens), -1))
        alone = min(k - 1, round(k * (1 - self.anchors)))
        kept = Kept.at(tokens, torch.empty(len(tokens), 0, dtype=torch.long, device=tokens.device))
        if alone:
            kept = self.wrapped(alone).reduce(vision)
        return separately(kept, tokens, lambda result, among: absorbed(result, among, k))


def absorbed(kept: Kept, tokens: Tensor, count: int) -> Kept:
    """Returns `count` tokens of each image: those kept, and anchors that took in all others.

    Args:
        kept: fewer than `count` of them.
        tokens: (M, N, d).
        count: tokens of an image that stay.
    """
    anchors = torch.stack(kept.indices)
    # kept tokens and groups of all others, in the order of their token indices
    rest = others(anchors, tokens.shape[1])
    groups = grouped(take(tokens, rest), min(count - anchors.shape[1], rest.shape[1]))
    indices, order = torch.cat([anchors, rest.gather(1, groups.medians)], 1).sort(1)
    features = torch.cat([torch.stack(kept.features), groups.means.to(tokens)], 1)
    sizes = torch.cat([torch.ones_like(anchors), groups.sizes], 1)
    return Kept(list(indices), list(take(features, order)), list(sizes.gather(1, order)))


@dataclass(frozen=True)
class Groups:
    """Tokens around k anchors, in the anchors' order.

    Args:
        means: (M, k, d), in fp32.
        sizes: tokens of each group, (M, k).
        medians: of the tokens' indices, of two middle ones the lower, (M, k).
    """

    means: Tensor
    sizes: Tensor
    medians: Tensor


def grouped(tokens: Tensor, count: int) -> Groups:
    """Groups the tokens (M, n, d) by the most similar one of `count` anchors."""
    total, similarity = tokens.shape[1], pairwise_cosine(tokens, tokens)
    anchors = anchors_of(similarity, count)
    nearest = similarity.gather(2, anchors[:, None].expand(-1, total, -1)).argmax(-1)
    # an anchor belongs to itself, whatever equals it
    nearest = nearest.scatter(
        1, anchors, torch.arange(count, device=tokens.device).expand_as(anchors)
    )
    sums, floating = sums_by_nearest(tokens, nearest, count)
    sizes = floating[..., 0].long()
    # sorted by group and then by index, a group's tokens follow one another
    members = (nearest * total + torch.arange(total, device=tokens.device)).sort(1).values % total
    # where a group begins among the members, and half of its size further
    middle = sizes.cumsum(1) - sizes + (sizes - 1) // 2
    return Groups(sums / floating, sizes, members.gather(1, middle))


def anchors_of(similarity: Tensor, count: int) -> Tensor:
    """Returns the tokens with the largest product of density and distinctness, ascending.

    Shapes: cosines (M, n, n) -> (M, count).
    """
    density = similarity.sum(-1)
    # entry (i, j): whether j is denser than i; the densest token is distinct from all
    denser = density[:, None] > density[..., None]
    nearest = similarity.masked_fill(~denser, -torch.inf).amax(-1)
    distinct = torch.where(denser.any(-1), 1 - nearest, 1)
    return top(density * distinct, count)
