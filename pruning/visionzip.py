"""VisionZip: dominant tokens by the CLS token's attention, the rest merged into contextual ones."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlm_prune.kernels.pairwise_cosine import pairwise_cosine
from vlm_prune.pruning.base import Stage, VisionPruner
from vlm_prune.pruning.received import in_tower
from vlm_prune.pruning.select import averaged, others
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.tokens import Kept, VisionTokens, take, top


@dataclass
class VisionZip(VisionPruner):
    """Keep the tokens that the CLS token attends to and average the others into a few.

    https://arxiv.org/abs/2412.04467

    Args:
        contextual: share of the budget that goes to merged tokens; the default gives the paper's
            10 of 64, 20 of 128 and 30 of 192.

    Contextual tokens start from evenly spaced tokens outside the dominant set; every other one is
    averaged into the start whose key in the tower has the largest cosine, before the projector.
    The paper counts the CLS token itself as one dominant token; LLaVA's projector never sees it, so
    here all are patches. Merged tokens stand at their start's place, not behind the dominant ones.
    """

    contextual: float = 0.15625
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
        starts = torch.arange(merged, device=rest.device) * (rest.shape[1] // merged)
        starts = starts.expand(len(rest), -1)
        targets, joining = rest.gather(1, starts), rest.gather(1, others(starts, rest.shape[1]))
        keys = vision.keys()
        nearest = pairwise_cosine(take(keys, joining), take(keys, targets)).argmax(-1)
        means = averaged(take(vision.features, targets), take(vision.features, joining), nearest)
        features = torch.cat([take(vision.projected, dominant), vision.projector(means)], 1)
        places, order = torch.cat([dominant, targets], 1).sort(1)
        return Kept(list(places), list(take(features, order)))
