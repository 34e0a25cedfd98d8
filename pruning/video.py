"""What methods share that compare the frames of a video."""

from abc import abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vlm_prune.pruning.base import Stage, VisionPruner
from vlm_prune.vlm.families import Need
from vlm_prune.vlm.tokens import Kept, VisionTokens


@dataclass
class VideoPruner(VisionPruner):
    """Reduces videos, whose frames it compares; images beside them are left whole."""

    stage: ClassVar[Stage] = "projector"

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"videos"})

    def reduce(self, vision: VisionTokens) -> Kept:
        """Keeps all tokens of images."""
        count, tokens = vision.projected.shape[:2]
        whole = torch.arange(tokens, device=vision.projected.device)
        return Kept.at(vision.projected, whole.expand(count, -1))

    @abstractmethod
    def reduce_video(self, vision: VisionTokens) -> Kept:
        """Chooses or merges tokens of videos."""


def frames_of(vision: VisionTokens, values: Tensor | None = None) -> Tensor:
    """Returns tokens frame by frame, (M, T, n, d): the projected ones,
    or other `values` (M, N, d).
    """
    values = vision.projected if values is None else values
    frames: Tensor = values.unflatten(1, (vision.frames, -1))
    return frames


def spread(k: int, count: int) -> list[int]:
    """Returns `k` indices below `count` at even distances, in the middle of their shares."""
    return [(2 * index + 1) * count // (2 * k) for index in range(k)]


def apportioned(weights: Tensor, total: int, most: int) -> list[int]:
    """Splits `total` in proportion to `weights` (T,), into whole numbers by largest remainders.

    Shares above `most` are cut to it, and what that frees goes to the others in proportion; ties go
    to the lowest index.

    Args:
        weights: not negative, (T,).
        total: the sum, at most T times `most`.
        most: the largest share.
    """
    values, free, left = weights.double().tolist(), list(range(len(weights))), total
    while True:
        whole = sum(values[index] for index in free)
        exact = {i: left * (values[i] / whole if whole > 0 else 1 / len(free)) for i in free}
        below = [index for index in free if exact[index] < most]
        if len(below) == len(free):
            break
        left -= most * (len(free) - len(below))
        free = below
    shares = [int(exact.get(index, most)) for index in range(len(weights))]
    order = sorted(free, key=lambda index: (shares[index] - exact[index], index))
    for index in order[: total - sum(shares)]:
        shares[index] += 1
    return shares


def likeness_to_before(frames: Tensor) -> Tensor:
    """Returns the cosine of each token to the one at its place in the frame before, in fp32.

    Shapes: (..., T, n, d) -> (..., T - 1, n).
    """
    # frame by frame, so that no copy of the video is made
    alike = [
        cosine_similarity(after.float(), before.float(), dim=-1)
        for before, after in pairwise(frames.unbind(-3))
    ]
    none = frames[..., :0, :, 0].float()
    return torch.stack(alike, -2) if alike else none


def frame_means(frames: Tensor) -> Tensor:
    """Returns the mean of each frame's tokens, (M, T, n, d) -> (M, T, d), in fp32."""
    return frames.mean(2, dtype=torch.float32)


def segment_starts(means: Tensor, fewest: int, threshold: float) -> list[int]:
    """Returns the first frames of the segments of one video.

    It is cut where a frame's mean token is less like the next one's than `threshold`, and at the
    `fewest` - 1 places where it is least like it.

    Args:
        means: of the frames, (T, d).
        fewest: segments, if there are as many frames.
        threshold: of the cosine.
    """
    alike = cosine_similarity(means[:-1], means[1:], dim=-1)
    cuts = (alike < threshold).nonzero()[:, 0]
    least = alike.argsort(stable=True)[: fewest - 1]
    return [0, *(1 + torch.cat([cuts, least]).unique()).tolist()]
