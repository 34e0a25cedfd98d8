"""Control: fewer frames."""

from dataclasses import dataclass

import torch

from vlm_prune.pruning.video import VideoPruner, spread
from vlm_prune.vlm.budget import even_shares
from vlm_prune.vlm.tokens import Kept, VisionTokens


@dataclass
class Frames(VideoPruner):
    """Keep as few frames of a video as hold the budget, at even distances.

    Where the budget is no multiple of a frame's tokens, those frames are thinned evenly.
    """

    def reduce_video(self, vision: VisionTokens) -> Kept:
        k, size = self.count(vision), vision.projected.shape[1] // vision.frames
        kept = spread(-(-k // size), vision.frames)
        shares = even_shares(k, len(kept))
        indices = [
            frame * size + token
            for frame, share in zip(kept, shares, strict=True)
            for token in spread(share, size)
        ]
        at = torch.tensor(indices, device=vision.projected.device)
        return Kept.at(vision.projected, at.expand(len(vision.projected), -1))
