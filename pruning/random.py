"""Control: tokens at random."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlm_prune.pruning.base import ScorePruner, Stage
from vlm_prune.vlm.tokens import VisionTokens


@dataclass
class Random(ScorePruner):
    """Keep tokens drawn uniformly, anew for each image; the draw depends on its pixels and `seed`."""

    stage: ClassVar[Stage] = "projector"

    def score(self, vision: VisionTokens) -> Tensor:
        tokens = vision.projected.shape[1]
        draws = [
            torch.rand(tokens, generator=torch.Generator().manual_seed(self.seed * 2**32 + image))
            for image in vision.seeds
        ]
        return torch.stack(draws).to(vision.projected.device)
