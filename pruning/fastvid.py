"""FastVID: salient tokens of each frame, and segments of a video merged around dense tokens."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlm_prune.pruning.base import PositionRule, Stage
from vlm_prune.pruning.received import in_tower
from vlm_prune.pruning.select import density_centers, others, sums_by_nearest
from vlm_prune.pruning.video import VideoPruner, frame_means, frames_of, segment_starts
from vlm_prune.vlm.budget import even_shares
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.tokens import Kept, VisionTokens, top


@dataclass
class FastVID(VideoPruner):
    """Keep of each frame the tokens that the tower attends to; of each segment of alike frames,
    merge the others around tokens that stand for many.

    https://arxiv.org/abs/2503.11187

    Args:
        segments: fewest segments.
        threshold: cosine of two frames' means below which a segment ends.
        context: share of the budget that goes to merged tokens.
        stride: every `stride`-th frame of a segment, counted from its end, holds its merged tokens.
        weight: least weight of a token among those that it merges with.
        neighbors: nearest tokens of its frame, itself among them, that a density is taken over.

    The paper compares features of whole frames from the tower; here they are means of projected tokens.
    Where the frames that hold merged tokens are full, the other frames of the segment hold the rest.
    Without a CLS token the tower's attention is the mean over the frame.
    """

    segments: int = 8
    threshold: float = 0.9
    context: float = 0.4
    stride: int = 4
    weight: float = 0.6
    neighbors: int = 4
    stage: ClassVar[Stage] = "encoder"
    authors_positions: ClassVar[PositionRule] = "original"
    paper: ClassVar[str] = "https://arxiv.org/abs/2503.11187"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("segments", "stride", "neighbors"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)} is out of range; give 1 or more")
        if not 0 <= self.context < 1:
            raise InputError(f"context {self.context} is out of range; give a share in [0, 1)")
        if not 0 <= self.weight <= 1:
            raise InputError(f"weight {self.weight} is out of range; give a share in [0, 1]")

    def reduce_video(self, vision: VisionTokens) -> Kept:
        k, frames = self.count(vision), frames_of(vision)
        attention = in_tower(vision, "cls").unflatten(1, (vision.frames, -1))
        shares = even_shares(k, vision.frames)
        indices, features = [], []
        for tokens, salience, means in zip(frames, attention, frame_means(frames), strict=True):
            starts = segment_starts(means, self.segments, self.threshold)
            kept = [
                self.segment(tokens, salience, shares, range(first, end))
                for first, end in zip(starts, [*starts[1:], vision.frames], strict=True)
            ]
            indices.append(torch.cat([at for at, _ in kept]))
            features.append(torch.cat([rows for _, rows in kept]))
        return Kept(indices, features)

    def segment(
        self, tokens: Tensor, salience: Tensor, shares: list[int], frames: range
    ) -> tuple[Tensor, Tensor]:
        """Returns indices in the video and features of what is kept of one segment.

        Args:
            tokens: of the video, (T, n, d).
            salience: attention that they receive, (T, n).
            shares: of the frames in the budget.
            frames: of the segment.
        """
        size = tokens.shape[1]
        # a share of each frame is chosen by attention, the rest are merged around dense tokens
        salient = {f: shares[f] - int(self.context * shares[f]) for f in frames}
        budgets = self.context_budgets(shares, salient, frames, size)
        salient_kept: dict[int, Tensor] = {f: top(salience[f], salient[f]) for f in frames}
        rest = {f: others(salient_kept[f][None], size)[0] for f in frames}
        targets = {
            f: rest[f][density_centers(tokens[f, rest[f]], budgets[f], self.neighbors)]
            for f in frames
        }
        merged = self.merged(tokens, rest, targets, frames)
        indices = torch.cat([f * size + at for f in frames for at in (salient_kept[f], targets[f])])
        features = torch.cat(
            [kept for f in frames for kept in (tokens[f, salient_kept[f]], merged[f])]
        )
        order = indices.argsort()
        return indices[order], features[order]

    def context_budgets(
        self, shares: list[int], salient: dict[int, int], frames: range, size: int
    ) -> dict[int, int]:
        """Returns how many merged tokens each frame of a segment holds.

        Args:
            shares: of the frames in the budget.
            salient: tokens that each keeps for their attention.
            frames: of the segment.
            size: tokens of a frame.
        """
        left = sum(shares[f] - salient[f] for f in frames)
        budgets = dict.fromkeys(frames, 0)
        # every few frames from the last one on hold merged tokens; others if these are full
        anchors = list(frames)[:: -self.stride][::-1]
        for group in (anchors, [f for f in frames if f not in anchors]):
            while left and (free := [f for f in group if budgets[f] < size - salient[f]]):
                for f, share in zip(free, even_shares(left, len(free)), strict=True):
                    given = min(share, size - salient[f] - budgets[f])
                    budgets[f] += given
                    left -= given
        return budgets

    def merged(
        self,
        tokens: Tensor,
        rest: dict[int, Tensor],
        targets: dict[int, Tensor],
        frames: range,
    ) -> dict[int, Tensor]:
        """Returns the merged tokens that each frame of a segment holds, (c, d).

        Args:
            tokens: of the video, (T, n, d).
            rest: tokens of each frame that are not kept for their attention.
            targets: those of them that others merge with.
            frames: of the segment.
        """
        counts = [len(targets[f]) for f in frames]
        start = torch.cat([tokens[f, targets[f]] for f in frames])
        if not len(start):
            return dict(zip(frames, start.split(counts), strict=True))
        sums, sizes = torch.zeros_like(start, dtype=torch.float32), start.new_zeros(len(start), 1)
        directions = normalize(start.float(), dim=-1)
        # one frame after the other: of a long segment all cosines at once would be many
        for f in frames:
            joining = rest[f][~torch.isin(rest[f], targets[f])]
            joined = tokens[f, joining].float()
            nearest = (normalize(joined, dim=-1) @ directions.T).argmax(1)
            more, members = sums_by_nearest(joined[None], nearest[None], len(start))
            sums, sizes = sums + more[0], sizes + members[0]
        # a target keeps at least `weight` of itself in its mean
        weight = torch.clamp(1 / (sizes.float() + 1), min=self.weight)
        mean = sums / sizes.clamp_min(1)
        whole = torch.where(sizes > 0, weight * start.float() + (1 - weight) * mean, start.float())
        return dict(zip(frames, whole.to(tokens.dtype).split(counts), strict=True))
