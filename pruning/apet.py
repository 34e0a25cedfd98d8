"""ApET: keep the tokens that a few others cannot express."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from vlm_prune.kernels.pairwise_cosine import pairwise_cosine
from vlm_prune.pruning.base import DecoderPruner, Pruner, Stage, VisionPruner
from vlm_prune.pruning.schedule import check_layer
from vlm_prune.pruning.select import averaged, others
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.tokens import DecoderTokens, Kept, VisionTokens, take, top


@dataclass
class Apet(VisionPruner):
    """Keep the tokens with the largest error when they are written as sums of a few basis tokens,
    and average each other one into the kept token that it resembles most; no attention is read.

    https://arxiv.org/abs/2602.19870

    This is the stage behind the vision tower. The authors cut a second time inside the language
    model, after layer 16 of 32 (14 of 28 for Qwen2.5-VL): `apet+apet@16`, with their counts.

    Args:
        basis: basis tokens, spread by farthest-point sampling; they are always kept.

    Merging comes before the projector. Farthest-point sampling starts at the token farthest from
    the mean, and resemblance is the cosine; the paper's choices of both are not known.
    """

    basis: int = 10
    stage: ClassVar[Stage] = "encoder"
    paper: ClassVar[str] = "https://arxiv.org/abs/2602.19870"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_basis(self.basis)

    @classmethod
    def at_layer(cls, layer: int) -> Pruner:
        return ApetInside(layer=layer)

    def reduce(self, vision: VisionTokens) -> Kept:
        kept, nearest = compressed(vision.features, self.count(vision), self.basis)
        merged = averaged_into(vision.features, kept, nearest)
        # tokens that took none stay as they are
        absorbing = one_hot(nearest, kept.shape[1]).any(1)[..., None]
        alone = take(vision.projected, kept)
        return Kept(list(kept), list(torch.where(absorbing, vision.projector(merged), alone)))


@dataclass
class ApetInside(DecoderPruner):
    """ApET on the hidden states of image tokens, inside the language model: `apet@16`.

    https://arxiv.org/abs/2602.19870

    Args:
        basis: as for `Apet`.
        layer: decoder layers (of 32) that have run when tokens are merged.
    """

    basis: int = 10
    layer: int = 16
    paper: ClassVar[str] = "https://arxiv.org/abs/2602.19870"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_basis(self.basis)
        check_layer(self.layer)

    def pattern(self) -> list[tuple[int, float]]:
        return [(self.layer, 1)]

    def reduce(self, tokens: DecoderTokens, keep: int) -> Kept:
        kept, nearest = compressed(tokens.features, keep, self.basis)
        return Kept(list(kept), list(averaged_into(tokens.features, kept, nearest)))


def check_basis(basis: int) -> None:
    """Raises `InputError` unless there is a basis token."""
    if basis < 1:
        raise InputError(f"basis {basis} is out of range; give at least 1 token")


def compressed(tokens: Tensor, keep: int, basis: int) -> tuple[Tensor, Tensor]:
    """Returns the tokens that stay, ascending (M, keep), and for each other one, in its order, the
    most
    similar of them, (M, N - keep).

    Args:
        tokens: (M, N, d).
        keep: how many stay: the basis, and then the tokens with the largest errors.
        basis: how many basis tokens there are.
    """
    exact = tokens.float()
    chosen = farthest_points(exact, min(basis, keep))
    # the basis itself always stays
    error = approximation_error(exact, take(exact, chosen)).scatter(1, chosen, torch.inf)
    kept = top(error, keep)
    dropped = take(tokens, others(kept, tokens.shape[1]))
    return kept, pairwise_cosine(dropped, take(tokens, kept)).argmax(-1)


def averaged_into(tokens: Tensor, kept: Tensor, nearest: Tensor) -> Tensor:
    """Returns the kept tokens, averaged with those that `compressed` assigns to them, (M, k, d).

    Args:
        tokens: (M, N, d).
        kept: indices of the kept ones, (M, k).
        nearest: for each other token the kept one that it joins, (M, N - k).
    """
    return averaged(take(tokens, kept), take(tokens, others(kept, tokens.shape[1])), nearest)


def farthest_points(tokens: Tensor, count: int) -> Tensor:
    """Chooses tokens by farthest-point sampling with Euclidean distances, first
    the one farthest from the mean.

    Shapes: (M, N, d) -> (M, count), in the order chosen.
    """
    images = torch.arange(len(tokens), device=tokens.device)
    # at first to the mean, then to the nearest chosen token; -1 for chosen ones
    distance = (tokens - tokens.mean(1, keepdim=True)).square().sum(-1)
    chosen = tokens.new_empty(len(tokens), count, dtype=torch.long)
    for step in range(count):
        pick = chosen[:, step] = distance.argmax(1)
        to_it = (tokens - tokens[images, pick, None]).square().sum(-1)
        distance = torch.minimum(distance, to_it) if step else to_it
        distance[images, pick] = -1
    return chosen


def approximation_error(tokens: Tensor, basis: Tensor) -> Tensor:
    """Returns the length of what is left of each token without its best
    linear combination of a basis.

    Shapes: tokens (M, N, d), basis (M, m, d), of any rank -> (M, N).
    """
    # least squares: (M, N, d) @ (M, d, m)
    coefficients = tokens @ torch.linalg.pinv(basis)
    error: Tensor = (tokens - coefficients @ basis).norm(dim=-1)
    return error
