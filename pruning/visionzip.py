"""VisionZip: dominant tokens by the CLS token's attention, the rest merged into contextual ones."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from vlm_prune.kernels.pairwise_cosine import pairwise_cosine
from vlm_prune.pruning.base import Stage, VisionPruner
from vlm_prune.pruning.received import in_tower
from vlm_prune.pruning.select import averaged, others, sums_by_nearest
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.tokens import Kept, VisionTokens, take, top


@dataclass
class VisionZip(VisionPruner):
    """Keep the tokens that the CLS token attends to and average the others into a few.

    https://arxiv.org/abs/2412.04467

    Args:
        contextual: share of the budget that goes to merged tokens; the default gives the paper's
            10 of 64, 20 of 128 and 30 of 192.
        released: merge as the authors' code does: compare keys averaged over heads, and add the
            mean of the tokens that join a start to it. The paper averages all tokens of a group, by
            their keys' similarity; the default takes the heads of a key side by side.

    Contextual tokens start from evenly spaced tokens outside the dominant set; every other one is
    averaged into the start whose key in the tower has the largest cosine, before the projector.
    The paper counts the CLS token itself as one dominant token; LLaVA's projector never sees it, so
    here all are patches. Merged tokens stand where their start stood, not behind the dominant ones.
    """

    contextual: float = 0.15625
    released: bool = False
    stage: ClassVar[Stage] = "encoder"
    paper: ClassVar[str] = "https://arxiv.org/abs/2412.04467"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.contextual < 1:
            raise InputError(
                f"contextual {self.contextual} is out of range; give a share in [0, 1)"
            )

    def reduce(self, vision: VisionTokens) -> Kept:
        k, tokens = self.count(vision), vision.features.shape[1]
        merged = min(k - 1, round(self.contextual * k))
        dominant = top(in_tower(vision, "cls"), k - merged)
        if merged == 0:
            return Kept.at(vision.projected, dominant)
        rest = others(dominant, tokens)
        # targets at even distances among the rest, and the others, which join them
        starts = torch.arange(merged, device=rest.device) * (rest.shape[1] // merged)
        starts = starts.expand(len(rest), -1)
        targets, joining = rest.gather(1, starts), rest.gather(1, others(starts, rest.shape[1]))
        keys = mean_keys(vision) if self.released else vision.keys()
        nearest = pairwise_cosine(take(keys, joining), take(keys, targets)).argmax(-1)
        combine = with_mean_added if self.released else averaged
        merged_tokens = combine(
            take(vision.features, targets), take(vision.features, joining), nearest
        )
        # where several tokens are made of one by the model, projecting its mean is not what it does
        absorbing = one_hot(nearest, merged).any(1)[..., None]
        alone = take(vision.projected, targets)
        projected = torch.where(absorbing, vision.projector(merged_tokens), alone)
        features = torch.cat([take(vision.projected, dominant), projected], 1)
        # back to reading order
        indices, order = torch.cat([dominant, targets], 1).sort(1)
        return Kept(list(indices), list(take(features, order)))


def mean_keys(vision: VisionTokens) -> Tensor:
    """Returns the tower's keys of the N tokens, averaged over heads, (M, N, d)."""
    keys = vision.query_key()[1].mean(1)
    return vision.pooled(keys[:, int(vision.has_cls) :])


def with_mean_added(kept: Tensor, dropped: Tensor, nearest: Tensor) -> Tensor:
    """Returns each kept token plus the mean of the dropped ones that are assigned to it.

    Shapes: kept (M, k, d), dropped (M, n, d), nearest (M, n) -> (M, k, d).

    Args:
        kept: tokens that take others in.
        dropped: tokens that join one of them.
        nearest: the index of the kept token that each dropped one joins.
    """
    sums, sizes = sums_by_nearest(dropped, nearest, kept.shape[1])
    return (kept.float() + sums / sizes.clamp_min(1)).to(kept.dtype)
