"""DivPrune: the most diverse subset of the image tokens."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlm_prune.pruning.base import OrderPruner, Stage
from vlm_prune.pruning.select import max_min
from vlm_prune.vlm.tokens import VisionTokens


@dataclass
class DivPrune(OrderPruner):
    """Maximize the smallest cosine distance between kept projected tokens, greedily.

    https://arxiv.org/abs/2503.02175
    """

    stage: ClassVar[Stage] = "projector"
    paper: ClassVar[str] = "https://arxiv.org/abs/2503.02175"

    def order(self, vision: VisionTokens, count: int) -> Tensor:
        return max_min(vision.projected, count)
