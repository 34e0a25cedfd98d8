"""VisPruner: important tokens by the CLS token's attention, and diverse ones among the rest."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlm_prune.kernels.pairwise_cosine import pairwise_cosine
from vlm_prune.pruning.base import Stage, VisionPruner
from vlm_prune.pruning.received import in_tower
from vlm_prune.pruning.select import others
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.tokens import Kept, VisionTokens, take, top


@dataclass
class VisPruner(VisionPruner):
    """Keep the tokens that the CLS token attends to, and remove duplicates from the others.

    https://arxiv.org/abs/2412.01818

    Args:
        important: share of the budget chosen by attention.
        step: duplicates removed at a time, by the cosine of tower features.
        released: split the tokens as the authors' code does: first in the order of their attention,
            then those of the smaller group that are left, most similar first, before the others.
            The paper splits without saying how; the default keeps the image's order.
    """

    important: float = 0.5
    step: int = 8
    released: bool = False
    stage: ClassVar[Stage] = "encoder"
    paper: ClassVar[str] = "https://arxiv.org/abs/2412.01818"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.important <= 1 or self.step < 1:
            raise InputError("important must be a share in [0, 1] and step at least 1")

    def reduce(self, vision: VisionTokens) -> Kept:
        k, tokens = self.count(vision), vision.features.shape[1]
        scores, important = in_tower(vision, "cls"), int(self.important * k)
        attended = top(scores, important)
        rest = others(attended, tokens)
        if self.released:
            rest = scores.argsort(dim=1, descending=True, stable=True)[:, important:]
        distinct = without_duplicates(
            take(vision.features, rest), k - important, self.step, sort=not self.released
        )
        chosen = torch.cat([attended, rest.gather(1, distinct)], 1)
        return Kept.at(vision.projected, chosen.sort(1).values)


def without_duplicates(features: Tensor, k: int, step: int, sort: bool = True) -> Tensor:
    """Removes duplicates: the `step` even tokens most similar to any odd one, again
    and again until `k` are left.

    Similarity is the cosine.

    Shapes: (M, R, d) -> (M, k), ascending if `sort`.

    Args:
        features: tokens in the order in which they are split.
        k: tokens to keep.
        step: tokens removed at a time.
        sort: restore the order after each step; otherwise even tokens stand in front, the most
            similar first.
    """
    similarity = pairwise_cosine(features, features)
    left = torch.arange(features.shape[1], device=features.device).repeat(len(features), 1)
    while left.shape[1] > k:
        even, odd = left[:, ::2], left[:, 1::2]
        removed = min(step, left.shape[1] - k, even.shape[1])
        rows = torch.arange(len(left), device=left.device)[:, None, None]
        closest = similarity[rows, even[..., None], odd[:, None]]
        closest = closest.amax(-1) if odd.shape[1] else closest.sum(-1)
        # the least similar ones stay; without sorting, the most similar of them come first
        order = closest.argsort(dim=1, stable=True)[:, : even.shape[1] - removed]
        left = torch.cat([even.gather(1, order.flip(1)), odd], 1)
        left = left.sort(1).values if sort else left
    return left
