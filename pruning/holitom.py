"""HoliTom: still places of a video averaged over windows that free the most tokens."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlm_prune.pruning.base import Stage
from vlm_prune.pruning.received import in_tower
from vlm_prune.pruning.select import clustered
from vlm_prune.pruning.video import VideoPruner, apportioned, frames_of, likeness_to_before
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.tokens import Kept, VisionTokens, top


@dataclass
class HoliTom(VideoPruner):
    """Cut the video into windows so that as many tokens as possible are still in them, make one of each
    place that is, and keep of the still ones cluster means and of the others the most attended to.

    https://arxiv.org/abs/2505.21334

    Args:
        threshold: cosine of a token to the one at its place in the frame before above which it is
            still; the paper has 0.65 at a tenth of the tokens.
        neighbors: nearest tokens, itself among them, that a density is taken over.

    A place is still in a window if it is in each of its frames behind the first; windows make the sum
    of these tokens largest, which dynamic programming finds. Their mean stands in the window's first
    frame. Each frame's other tokens and each window's means share the budget in proportion to their
    numbers. Where fewer would be left than the budget, the least alike stay apart. The paper's whole is
    a cascade, `holitom+fastv@21+merge`.
    """

    threshold: float = 0.8
    neighbors: int = 7
    stage: ClassVar[Stage] = "encoder"
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.21334"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -1 <= self.threshold <= 1:
            raise InputError(
                f"threshold {self.threshold} is out of range; give a cosine in [-1, 1]"
            )
        if self.neighbors < 1:
            raise InputError(f"neighbors {self.neighbors} is out of range; give 1 or more")

    def reduce_video(self, vision: VisionTokens) -> Kept:
        k, frames = self.count(vision), frames_of(vision)
        attention = in_tower(vision, "cls").unflatten(1, (vision.frames, -1))
        kept = [
            self.one(tokens, salience, k)
            for tokens, salience in zip(frames, attention, strict=True)
        ]
        return Kept([indices for indices, _ in kept], [features for _, features in kept])

    def one(self, tokens: Tensor, salience: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Returns indices (k,) and features (k, d) of what is kept of one video.

        Args:
            tokens: of the video, (T, n, d).
            salience: attention that they receive, (T, n).
            k: how many are kept.
        """
        count, size = salience.shape
        alike = likeness_to_before(tokens)
        windows = still_windows(alike > self.threshold)
        still = self.averaged_places(alike, windows, count * size - k)
        # each window's still places, then what is left of each of its frames
        groups: list[tuple[int, Tensor, Tensor | None]] = []
        for (first, end), places in zip(windows, still, strict=True):
            at = places.nonzero()[:, 0]
            groups.append((first, at, tokens[first:end, at].mean(0, dtype=torch.float32)))
            others = (~places).nonzero()[:, 0]
            groups += [(frame, others, None) for frame in range(first, end)]
        sizes = torch.tensor([len(at) for _, at, _ in groups])
        indices, features = [], []
        for (frame, at, means), share in zip(groups, apportioned(sizes, k, size), strict=True):
            if means is None:
                chosen = at[top(salience[frame, at], share)]
                rows = tokens[frame, chosen]
            else:
                own, rows = clustered(means, share, self.neighbors)
                chosen, rows = at[own], rows.to(tokens.dtype)
            indices.append(frame * size + chosen)
            features.append(rows)
        found = torch.cat(indices)
        order = found.argsort()
        return found[order], torch.cat(features)[order]

    def averaged_places(
        self, alike: Tensor, windows: list[tuple[int, int]], most: int
    ) -> list[Tensor]:
        """Returns which places of each window become one token, masks (n,).

        They are the most alike of those that are still, as long as no more than `most` tokens go.

        Args:
            alike: cosines of tokens to those of the frame before, (T - 1, n).
            windows: first frame and end of each.
            most: tokens that may go.
        """
        # a place is as still as in the frame where it is least so
        least = [alike[first : end - 1] for first, end in windows]
        lowest = [
            own.amin(0) if len(own) else own.new_full(own.shape[1:], -torch.inf) for own in least
        ]
        scores = torch.stack(lowest)
        # a merged place frees a token in each frame of its window but one
        freed = torch.tensor([end - first - 1 for first, end in windows], device=alike.device)
        spent = freed[:, None].expand_as(scores).flatten()
        order = torch.where(scores > self.threshold, scores, -torch.inf).flatten()
        order = order.argsort(descending=True, stable=True)
        # as many of the most alike as may go together
        fits = (spent[order].cumsum(0) <= most) & (scores.flatten()[order] > self.threshold)
        merged = torch.zeros_like(spent, dtype=torch.bool)
        merged[order] = fits
        return list(merged.unflatten(0, scores.shape))


def still_windows(still: Tensor) -> list[tuple[int, int]]:
    """Returns the first frame and the end of each window of a video in which places are still.

    Windows maximize the sum of (frames - 1) x places that are still in the window; of equal ones
    those are taken whose last windows are shortest.

    Args:
        still: whether a token is like the one at its place in the frame before, (T - 1, n).
    """
    count = len(still) + 1
    run = torch.zeros_like(still[0], dtype=torch.long) if count > 1 else still.new_zeros(0)
    reach = []
    for frame in still:
        # for how many frames each place has been still, and how many places for at least so many
        run = (run + 1) * frame
        reach.append(torch.bincount(run, minlength=count).flip(0).cumsum(0).flip(0))
    places = [[0], *(torch.stack(reach).tolist() if reach else [])]
    # best[end]: the most that windows up to `end` free, the last of which begins at starts[end - 1]
    best, starts = [0], list[int]()
    for end in range(1, count + 1):
        gains = [
            best[first] + (end - first - 1) * places[end - 1][end - first - 1] * (end - first > 1)
            for first in range(end)
        ]
        start = max(range(end), key=lambda first: (gains[first], first))
        best.append(gains[start])
        starts.append(start)
    windows, end = [], count
    while end:
        windows.append((starts[end - 1], end))
        end = starts[end - 1]
    return windows[::-1]
