"""EVS: tokens that differ from the frame before."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlm_prune.pruning.video import VideoPruner, frames_of, likeness_to_before, spread
from vlm_prune.vlm.tokens import Kept, VisionTokens, top


@dataclass
class EVS(VideoPruner):
    """Keep the first frame, and of the others the tokens that are least like the one at the same
    place of the frame before.

    https://arxiv.org/abs/2510.14624

    Budgets below one frame, which the paper does not have, thin the first frame evenly.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2510.14624"

    def reduce_video(self, vision: VisionTokens) -> Kept:
        k, tokens = self.count(vision), frames_of(vision)
        videos, _, size, _ = tokens.shape
        if k < size:
            first = torch.tensor(spread(k, size), device=tokens.device)
            return Kept.at(vision.projected, first.expand(videos, -1))
        whole = torch.full((videos, size), torch.inf, device=tokens.device)
        scores = torch.cat([whole[:, None], 1 - likeness_to_before(tokens)], 1)
        return Kept.at(vision.projected, top(scores.flatten(1), k))
