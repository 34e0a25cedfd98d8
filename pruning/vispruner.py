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
    """

    important: float = 0.5
    step: int = 8
    stage: ClassVar[Stage] = "encoder"
    paper: ClassVar[str] = "https://arxiv.org/abs/2412.01818"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.important <= 1 or self.step < 1:
            raise InputError("important must be a share in [0, 1] and step at least 1")

    def reduce(self, vision: VisionTokens) -> Kept:
        k, tokens = self.count(vision), vision.features.shape[1]
        attended = top(in_tower(vision, "cls"), round(self.important * k))
        rest = others(attended, tokens)
        distinct = without_duplicates(take(vision.features, rest), k - attended.shape[1], self.step)
        chosen = torch.cat([attended, rest.gather(1, distinct)], 1)
        return Kept.at(vision.projected, chosen.sort(1).values)


def without_duplicates(features: Tensor, k: int, step: int) -> Tensor:
    """Split tokens into even and odd ones, remove the `step` even ones most similar to any odd one
    by cosine, and repeat until `k` are left.

    Shapes: (M, R, d) -> (M, k), ascending.
    """
    similarity = pairwise_cosine(features, features)
    left = torch.arange(features.shape[1], device=features.device).repeat(len(features), 1)
    while left.shape[1] > k:
        even, odd = left[:, ::2], left[:, 1::2]
        removed = min(step, left.shape[1] - k, even.shape[1])
        rows = torch.arange(len(left), device=left.device)[:, None, None]
        closest = similarity[rows, even[..., None], odd[:, None]]
        closest = closest.amax(-1) if odd.shape[1] else closest.sum(-1)
        distinct = even.gather(1, top(-closest, even.shape[1] - removed))
        left = torch.cat([distinct, odd], 1).sort(1).values
    return left
