"""Image tokens as plain tensors: what pruners see, what they give back, and index maths."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from vlm_prune.vlm.errors import InputError

Queries = Literal["all", "patches", "cls"]


@dataclass(frozen=True)
class Projector:
    """A two-layer MLP projector: W1 (h, d_v), b1 (h,), activation, W2 (d_l, h), b2 (d_l,)."""

    w1: Tensor
    b1: Tensor | None
    act: Callable[[Tensor], Tensor]
    w2: Tensor
    b2: Tensor | None


@dataclass(frozen=True)
class VisionTokens:
    """The tokens of M images of N tokens each, after the vision tower.

    Args:
        features: tower output that the projector reads, (M, N, d_v).
        projected: the projector's output, (M, N, d_l).
        grid: rows and columns of the token grid.
        seeds: one number per image that depends on its pixels alone, so that random draws are
            the same in any batch.
        projector: the weights between the two.
        received: mean attention each token receives from the given queries in the tower layer
            whose output is `features`, (M, N).
    """

    features: Tensor
    projected: Tensor
    grid: tuple[int, int]
    seeds: tuple[int, ...]
    projector: Projector
    received: Callable[[Queries], Tensor] = field(repr=False)


@dataclass(frozen=True)
class Kept:
    """What a pruner keeps of each image: original places, ascending, and features (k, d_l)."""

    places: list[Tensor]
    features: list[Tensor]

    @classmethod
    def at(cls, vision: VisionTokens, indices: Tensor) -> "Kept":
        """Keep tokens unchanged; `indices` is (M, k), in any order."""
        places = indices.sort(1).values
        rows = torch.arange(len(places), device=places.device)[:, None]
        return cls(list(places), list(vision.projected[rows, places]))


@dataclass
class Trace:
    """What happened inside a pruning block, for reports and pictures.

    `kept` holds the places kept of each image (after the last cut, for methods that prune inside
    the language model), `layer_tokens` the mean number of image tokens per image that each
    decoder layer computes, `cuts` the places kept at each cut, and `selection_s` / `vision_s`
    seconds spent selecting and encoding.
    """

    kept: list[Tensor] = field(default_factory=list)
    cuts: list[list[Tensor]] = field(default_factory=list)
    layer_tokens: list[float] = field(default_factory=list)
    selection_s: float = 0.0
    vision_s: float = 0.0


def tokens_for(budget: float, available: int) -> int:
    """Tokens per image that a budget means: a count, or a fraction in (0, 1].

    Raises:
        InputError: when a count is above `available`.
    """
    if isinstance(budget, int):
        if budget > available:
            raise InputError(
                f"budget {budget} is above the {available} tokens of an image; "
                f"give 1 to {available}, or a fraction such as 0.11"
            )
        return budget
    return max(1, round(budget * available))


def check_budget(budget: float) -> None:
    """Raises `InputError` unless `budget` is a positive count or a fraction in (0, 1]."""
    ok = budget >= 1 if isinstance(budget, int) else math.isfinite(budget) and 0 < budget <= 1
    if isinstance(budget, bool) or not ok:
        raise InputError(
            f"budget {budget} is out of range; give tokens per image (64) or a fraction (0.11)"
        )


def top(scores: Tensor, k: int) -> Tensor:
    """Indices of the `k` largest scores of each row, ascending; ties go to the lowest index.

    Shapes: scores (..., N) -> (..., k).
    """
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return order.sort(dim=-1).values


def compact(keep: Tensor, right_padded: bool = False) -> tuple[Tensor, Tensor]:
    """Gather indices that close the gaps of a boolean mask.

    Shapes: keep (B, L) -> index (B, L'), valid (B, L') with L' the longest row; shorter rows are
    padded on the left (or right), where `valid` is False and `index` points anywhere.
    """
    length = int(keep.sum(1).max()) if keep.numel() else 0
    order = keep.to(torch.int8).argsort(dim=1, stable=True, descending=right_padded)
    index = order[:, :length] if right_padded else order[:, keep.shape[1] - length :]
    return index, keep.gather(1, index)


def is_right_padded(mask: Tensor) -> bool:
    """Whether any row of a (B, L) validity mask ends in padding."""
    return bool((~mask[:, -1].bool()).any())


def image_ordinals(is_image: Tensor, images: int) -> Tensor:
    """For each prompt position the index of the image it belongs to, -1 for text; (B, L).

    Images have equally many placeholders each and come in row order.
    """
    if images == 0:
        return torch.full_like(is_image, -1, dtype=torch.long)
    each = int(is_image.sum()) // images
    order = is_image.flatten().cumsum(0) - 1
    ordinal = torch.div(order, max(each, 1), rounding_mode="floor").view_as(is_image)
    return torch.where(is_image, ordinal, torch.full_like(ordinal, -1))
