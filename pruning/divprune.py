"""DivPrune: the most diverse subset of the image tokens."""

from dataclasses import dataclass
from typing import ClassVar

from vlm_prune.pruning.base import Stage, VisionPruner
from vlm_prune.pruning.select import max_min
from vlm_prune.vlm.tokens import Kept, VisionTokens


@dataclass
class DivPrune(VisionPruner):
    """Maximize the smallest cosine distance between kept projected tokens, greedily.

    https://arxiv.org/abs/2503.02175
    """

    stage: ClassVar[Stage] = "projector"
    paper: ClassVar[str] = "https://arxiv.org/abs/2503.02175"

    def reduce(self, vision: VisionTokens) -> Kept:
        chosen = max_min(vision.projected, self.count(vision))
        return Kept.at(vision.projected, chosen.sort(1).values)
