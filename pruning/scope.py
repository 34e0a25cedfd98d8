"""SCOPE: salient image tokens that cover the others."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlm_prune.kernels.greedy_select import greedy_select
from vlm_prune.kernels.pairwise_cosine import pairwise_cosine
from vlm_prune.pruning.base import OrderPruner, Stage
from vlm_prune.pruning.received import in_tower
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.tokens import VisionTokens


@dataclass
class Scope(OrderPruner):
    """Add, one after the other, the token whose saliency times gain in coverage is the largest.

    https://arxiv.org/abs/2510.24214

    Saliency is the CLS token's attention; a set covers a token by its largest cosine to it, at
    least 0 (facility location). Both are taken where the tower hands its features on.

    Args:
        alpha: power of the saliency; at 0 coverage alone decides.
    """

    alpha: float = 1.0
    stage: ClassVar[Stage] = "encoder"
    paper: ClassVar[str] = "https://arxiv.org/abs/2510.24214"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha < 0:
            raise InputError(f"alpha {self.alpha} is negative; give 0 or more")

    def order(self, vision: VisionTokens, count: int) -> Tensor:
        saliency = in_tower(vision, "cls").float() ** self.alpha
        similarity = pairwise_cosine(vision.features, vision.features)
        return greedy_select(similarity, saliency, count, "coverage")
