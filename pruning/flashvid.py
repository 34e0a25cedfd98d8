"""FlashVID: diverse and salient tokens of each frame, and trees of alike tokens over frames."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlm_prune.kernels.pairwise_cosine import pairwise_cosine
from vlm_prune.pruning.base import Stage
from vlm_prune.pruning.received import in_tower
from vlm_prune.pruning.select import clustered, others, sums_by_nearest
from vlm_prune.pruning.video import VideoPruner, frame_means, frames_of, segment_starts
from vlm_prune.vlm.budget import even_shares
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.tokens import Kept, VisionTokens


@dataclass
class FlashVID(VideoPruner):
    """Keep of each frame tokens that are salient and differ from each other; merge others with the
    most similar one of the frame before, and what is left around tokens that stand for many.

    https://arxiv.org/abs/2602.08024

    Args:
        segments: fewest segments of the video; nothing is merged over their ends.
        threshold: cosine of two frames' means below which a segment ends.
        diverse: share of a frame's budget for salient and diverse tokens, rounded up.
        alike: cosine from which on a token joins one of the frame before.
        neighbors: nearest tokens of its frame, itself among them, that a density is taken over.
        relevance: whether a token's distances are also multiplied by its dot product with the mean
            token of its segment, as the authors' code does for LLaVA models and not for Qwen's.

    A token joins at most one of the frame before, and may be joined by several: each such tree becomes
    its mean, at its first token. The paper's whole starts from 1.25 times the budget and cuts after
    layer 20 of 28 by the last token's attention, to 0.3: nearly the cascade `flashvid+fastv@23` with
    `inside.queries=last`, which starts from 1.23 times and leaves a third.

    Deviations: so that a video has exactly its budget, frames with fewer trees than their share leave
    the rest to others, and where all together have fewer, the least alike tokens do not join; the
    authors' code splits what a segment has left in proportion to the trees of its frames, rounded up,
    and may keep more or fewer. `segments` is 8 for all models; the authors take 4 for Qwen's.
    """

    segments: int = 8
    threshold: float = 0.9
    diverse: float = 0.7
    alike: float = 0.8
    neighbors: int = 7
    relevance: bool = False
    stage: ClassVar[Stage] = "encoder"
    paper: ClassVar[str] = "https://arxiv.org/abs/2602.08024"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("segments", "neighbors"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)} is out of range; give 1 or more")
        if not 0 < self.diverse <= 1:
            raise InputError(f"diverse {self.diverse} is out of range; give a share in (0, 1]")

    def reduce_video(self, vision: VisionTokens) -> Kept:
        frames, size = vision.frames, vision.projected.shape[1] // vision.frames
        shares = even_shares(self.count(vision), frames)
        # of each frame's share a part is chosen by attention, the rest are trees over frames
        first = [ceil(self.diverse * share) for share in shares]
        attention = in_tower(vision, "cls").unflatten(1, (frames, -1))
        means, tokens = frame_means(frames_of(vision)), frames_of(vision)
        indices, features = [], []
        for video in range(len(tokens)):
            starts = segment_starts(means[video], self.segments, self.threshold)
            weights = attention[video]
            if self.relevance:
                weights = weights * segment_relevance(tokens[video], means[video], starts)
            salient = [
                diverse_salient(frame, salience, count)
                for frame, salience, count in zip(tokens[video], weights, first, strict=True)
            ]
            context = sum(shares) - sum(first)
            rest = [others(at[None], size)[0] for at in salient]
            parents = self.parents(tokens[video], rest, starts, context)
            budgets = fitted(
                [share - count for share, count in zip(shares, first, strict=True)],
                [int((joins < 0).sum()) for joins in parents],
            )
            at, kept = [], []
            for frame, (roots, merged) in self.trees(tokens[video], rest, parents):
                roots_kept, centers = clustered(merged, budgets[frame], self.neighbors)
                # both parts in reading order, with indices into the video
                chosen_tokens = torch.cat([salient[frame], roots[roots_kept]])
                order = chosen_tokens.argsort()
                at.append(chosen_tokens[order] + frame * size)
                chosen = tokens[video, frame, salient[frame]]
                kept.append(torch.cat([chosen, centers.to(chosen.dtype)])[order])
            indices.append(torch.cat(at[::-1]))
            features.append(torch.cat(kept[::-1]))
        return Kept(indices, features)

    def parents(
        self, tokens: Tensor, rest: list[Tensor], starts: list[int], fewest: int
    ) -> list[Tensor]:
        """Returns which token of the frame before each token joins,
        (r,) of each frame; -1 for none.

        Args:
            tokens: of the video, (T, n, d).
            rest: those of each frame that may join others.
            starts: first frames of segments.
            fewest: tokens that must join none.
        """
        parents, likeness = [torch.full_like(rest[0], -1)], [tokens.new_zeros(len(rest[0]))]
        for frame in range(1, len(tokens)):
            current, before = (tokens[f, rest[f]].float() for f in (frame, frame - 1))
            joins, best = torch.full_like(rest[frame], -1), current.new_zeros(len(current))
            if frame not in starts and len(current) and len(before):
                best, nearest = (normalize(current, dim=-1) @ normalize(before, dim=-1).T).max(1)
                joins = torch.where(best >= self.alike, nearest, joins)
            parents.append(joins)
            likeness.append(best)
        # the least alike stay by themselves where there would be too few trees
        joins, strength = torch.cat(parents), torch.cat([part.float() for part in likeness])
        order = torch.where(joins >= 0, strength, -torch.inf).argsort(descending=True, stable=True)
        joins[order[max(0, len(joins) - fewest) :]] = -1
        return list(joins.split([len(at) for at in rest]))

    def trees(
        self, tokens: Tensor, rest: list[Tensor], parents: list[Tensor]
    ) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        """Yields each frame, from the last to the first, with the first tokens and
        the means of the trees that begin in it.

        First tokens are (r,), means (r, d). In this order a chain of tokens arrives at its first one.

        Args:
            tokens: of the video, (T, n, d).
            rest: those of each frame that may join others.
            parents: those of the frame before that they join, -1 for none.
        """
        sums = sizes = None
        for frame in range(len(tokens) - 1, -1, -1):
            current, roots = tokens[frame, rest[frame]].float(), parents[frame] < 0
            # own tokens and what later frames have passed on to them
            total = current if sums is None else current + sums
            members = current.new_ones(len(current), 1) if sizes is None else 1 + sizes
            yield frame, (rest[frame][roots], (total / members)[roots])
            sums = sizes = None
            # sums and numbers of tokens are passed on to the frame before
            if not bool(roots.all()):
                joined = parents[frame][~roots][None], len(rest[frame - 1])
                sums = sums_by_nearest(total[~roots][None], *joined)[0][0]
                sizes = sums_by_nearest(members[~roots][None], *joined)[0][0]


def segment_relevance(tokens: Tensor, means: Tensor, starts: list[int]) -> Tensor:
    """Returns the dot product of each token with the mean token of its segment, (T, n), in fp32.

    Args:
        tokens: of a video, (T, n, d).
        means: of its frames, (T, d).
        starts: first frames of segments.
    """
    segments = means.tensor_split(starts[1:])
    centers = torch.cat([own.mean(0, keepdim=True).expand_as(own) for own in segments])
    return torch.stack([t.float() @ c for t, c in zip(tokens, centers, strict=True)])


def fitted(shares: list[int], available: list[int]) -> list[int]:
    """Returns shares cut to what is available, with what that frees spread
    evenly over those with more.
    """
    given = [min(pair) for pair in zip(shares, available, strict=True)]
    while left := sum(shares) - sum(given):
        free = [i for i, most in enumerate(available) if given[i] < most]
        for index, more in zip(free, even_shares(left, len(free)), strict=True):
            given[index] += min(more, available[index] - given[index])
    return given


def diverse_salient(tokens: Tensor, salience: Tensor, count: int) -> Tensor:
    """Chooses tokens one after the other by max-min distance times salience;
    (n, d), (n,) -> (k,), ascending.

    The first is the one farthest from its nearest neighbor.

    Args:
        tokens: of a frame.
        salience: attention that they receive.
        count: tokens to choose.
    """
    distance = (1 - pairwise_cosine(tokens[None], tokens[None])[0].float()) * salience.float()
    nearest = distance.clone().fill_diagonal_(torch.inf).amin(0)
    chosen = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    for step in range(count):
        best = nearest.masked_fill(chosen, -torch.inf).argmax()
        chosen[best] = True
        nearest = distance[best] if step == 0 else torch.minimum(nearest, distance[best])
    return chosen.nonzero()[:, 0]
