"""V-CAST: more tokens where the course of a video turns."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vlm_prune.pruning.select import min_max
from vlm_prune.pruning.video import VideoPruner, apportioned, frame_means, frames_of
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.tokens import Kept, VisionTokens, take, top


@dataclass
class VCast(VideoPruner):
    """Share the budget by how sharply the frames' mean token turns, and keep of each frame the
    tokens that are unlike its mean and large.

    https://arxiv.org/abs/2603.27650

    Args:
        temperature: of the softmax over frames.
    """

    temperature: float = 0.7
    paper: ClassVar[str] = "https://arxiv.org/abs/2603.27650"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0:
            raise InputError(f"temperature {self.temperature} is out of range; give more than 0")

    def reduce_video(self, vision: VisionTokens) -> Kept:
        k, frames = self.count(vision), frames_of(vision)
        size, means = frames.shape[2], frame_means(frames)
        # frame by frame, so that no copy of the video is made
        apart = [
            1 - cosine_similarity(frame.float(), mean[:, None], dim=-1)
            for frame, mean in zip(frames.unbind(1), means.unbind(1), strict=True)
        ]
        norms = torch.linalg.vector_norm(frames, dim=-1, dtype=torch.float32)
        scores = torch.stack(apart, 1) + min_max(norms)
        weights = (curvature(means) / self.temperature).softmax(1)
        kept = []
        for score, weight in zip(scores, weights, strict=True):
            shares = apportioned(weight, k, size)
            indices = [f * size + top(score[f], share) for f, share in enumerate(shares) if share]
            kept.append(torch.cat(indices))
        return Kept(kept, list(take(vision.projected, torch.stack(kept))))


def curvature(means: Tensor) -> Tensor:
    """Returns how far each frame's step turns to the next, (M, T, d) -> (M, T), in [0, 2].

    The first and the last frame get 1.
    """
    steps = means.diff(dim=1)
    turns = torch.ones_like(means[..., 0])
    turns[:, 1:-1] = 1 - cosine_similarity(steps[:, :-1], steps[:, 1:], dim=-1)
    return turns
