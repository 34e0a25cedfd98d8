"""No pruning: the unpruned model on the pruners' own road."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from vlm_prune.pruning.base import Pruner, Stage, VisionPruner
from vlm_prune.vlm.families import Family
from vlm_prune.vlm.tokens import Kept, VisionTokens


@dataclass
class NoPruning(VisionPruner):
    """Keep every token, whatever the budget."""

    stage: ClassVar[Stage] = "projector"

    def check(self, tokens: int, layers: int) -> None:
        """Accepts everything: the budget is not used."""

    def resolved(self, family: Family) -> Pruner:
        return replace(self, budget=1.0)

    def reduce(self, vision: VisionTokens) -> Kept:
        count, tokens = vision.projected.shape[:2]
        indices = torch.arange(tokens, device=vision.projected.device)
        return Kept.at(vision.projected, indices.expand(count, -1))

    def reduce_video(self, vision: VisionTokens) -> Kept:
        return self.reduce(vision)
