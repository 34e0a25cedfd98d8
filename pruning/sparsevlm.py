"""SparseVLM: text raters score image tokens, and what is dropped is partly recycled."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from vlm_prune.pruning.base import CountedTokens, DecoderScorePruner
from vlm_prune.pruning.received import in_decoder
from vlm_prune.pruning.select import density_gap
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.registry import Registry
from vlm_prune.vlm.layer_pruning import Cut
from vlm_prune.vlm.tokens import DecoderTokens, Kept, top


@dataclass
class SparseVLM(DecoderScorePruner):
    """Three cuts scored by the attention of visually relevant text; dropped tokens are clustered
    and come back as one token per cluster, its sum as in the paper.

    https://arxiv.org/abs/2410.04417

    Args:
        preset: the authors' counts by name (`192`, `128`, `96`, `64`), recycled tokens on top.
        recycle: tau, the share of dropped tokens, best scores first, that is recycled.
        clusters: theta, tokens made from the recycled ones, as a share of them.
        neighbors: k of the density estimate.
        released: cluster as the authors' code does: a cluster comes back as its mean and not as its
            sum, a density is taken over as many nearest tokens as there are clusters, itself among
            them, and the densest token takes the largest distance of any two.

    The paper sets each cut by the rank of the attention matrix; we keep a given number, as the
    authors' results at fixed budgets do, in the proportions of their `64`, and count recycled
    tokens in it. A sum stands at the token index of its cluster's center instead of behind the
    other tokens. Distances are divided by sqrt(D), so that densities stay above zero. Positions are
    renumbered, as in the authors' first version; their second, which also has other counts and reads 14
    heads alone, is not built, but for its positions (`positions=original`).
    """

    recycle: float = 0.3
    clusters: float = 0.1
    neighbors: int = 5
    released: bool = False
    chooses_queries: ClassVar[bool] = True
    counted: ClassVar[CountedTokens] = "at the cut"
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.04417"
    presets: ClassVar[Registry[tuple[float, ...]]] = Registry(
        "preset",
        {"192": (300, 200, 110), "128": (303, 110, 36), "96": (238, 48, 26), "64": (66, 30, 17)},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 <= self.recycle <= 1 and 0 <= self.clusters <= 1 and self.neighbors >= 1):
            raise InputError(
                "recycle and clusters must be shares in [0, 1] and neighbors at least 1"
            )

    def pattern(self) -> list[tuple[int, float]]:
        return [(3, 66), (7, 30), (16, 17)]

    def cuts(
        self, tokens: int, layers: int, allowed: Sequence[int] = (), frames: int = 0
    ) -> list[Cut]:
        cuts = super().cuts(tokens, layers, allowed, frames)
        if not self.preset:
            return cuts
        with_recycled, count = [], tokens
        for cut in cuts:
            kept = min(cut.keep, count)
            count = kept + self.recycled_count(count - kept)
            with_recycled.append(Cut(cut.layer, count))
        return with_recycled

    def recycled_count(self, dropped: int) -> int:
        """Returns how many tokens come back of `dropped` ones."""
        recycled = int(self.recycle * dropped)
        return min(recycled, int(self.clusters * recycled) + 1) if self.clusters else 0

    def unmerged_count(self, count: int, keep: int) -> int:
        """Returns how many tokens stay as they are where `count` become `keep`, recycled ones included."""
        return next(
            (k for k in range(keep, 0, -1) if k + self.recycled_count(count - k) <= keep), 0
        )

    def papers_count(self, tokens: int, layer_tokens: list[float]) -> float | None:
        """Returns the paper's count, which leaves recycled tokens out."""
        counts, before, now = [], tokens, tokens
        for computed in map(round, layer_tokens):
            if computed < before:
                now = self.unmerged_count(before, computed)
            counts.append(float(now))
            before = computed
        return super().papers_count(tokens, counts)

    def query_mask(self, tokens: DecoderTokens) -> Tensor:
        return raters(tokens.features, tokens.question, tokens.question_mask)

    def score(self, tokens: DecoderTokens) -> Tensor:
        return in_decoder(tokens, tokens.query_mask)

    def reduce(self, tokens: DecoderTokens, keep: int) -> Kept:
        scores, count = self.score(tokens), tokens.features.shape[1]
        # recycled tokens count toward what is kept
        unmerged = self.unmerged_count(count, keep)
        indices, features = [], []
        for score, image_features in zip(scores, tokens.features, strict=True):
            # best first
            order = score.argsort(descending=True, stable=True)
            kept, kept_features = order[:unmerged], image_features[order[:unmerged]]
            if keep > unmerged:
                # the best of the dropped tokens come back as one token per cluster
                share = int(self.recycle * (count - unmerged))
                recycled = order[unmerged:][: max(keep - unmerged, share)]
                centers, cluster = density_peaks(
                    image_features[recycled], keep - unmerged, self.neighbors, self.released
                )
                members = one_hot(cluster, keep - unmerged).to(image_features.dtype).T
                merged = members @ image_features[recycled]
                if self.released:
                    merged = merged / members.sum(1, keepdim=True)
                kept = torch.cat([kept, recycled[centers]])
                kept_features = torch.cat([kept_features, merged])
            ascending = kept.argsort()
            indices.append(kept[ascending])
            features.append(kept_features[ascending])
        return Kept(indices, features)


def raters(image: Tensor, text: Tensor, question_mask: Tensor) -> Tensor:
    """Returns which text tokens rate: those whose mean over image tokens v of
    softmax(v t^T) is at least average.

    Shapes: image (M, n, D), text (M, T, D), question_mask (M, T) -> (M, T).

    Args:
        image: hidden states v of image tokens.
        text: hidden states t of the question.
        question_mask: which tokens of the question are real.
    """
    similarity = image.float() @ text.float().transpose(1, 2)
    shares = similarity.masked_fill(
        ~question_mask[:, None], torch.finfo(torch.float32).min
    ).softmax(-1)
    relevance = shares.mean(1) * question_mask
    mean = relevance.sum(1, keepdim=True) / question_mask.sum(1, keepdim=True).clamp_min(1)
    return question_mask & (relevance >= mean)


def density_peaks(
    features: Tensor, count: int, neighbors: int, released: bool = False
) -> tuple[Tensor, Tensor]:
    """Clusters tokens around the `count` with the largest density x distance to a denser one.

    Density is exp(-mean squared distance to the nearest neighbors); the densest token takes its
    largest distance instead. Others join the nearest center.

    Shapes: (R, D) -> centers (C,), cluster of each token (R,).

    Args:
        features: tokens to cluster.
        count: clusters C.
        neighbors: nearest other tokens that a density is taken over.
        released: take it over the `count` nearest tokens, itself among them, and give the densest
            token the largest distance of any two.
    """
    distance = torch.cdist(features.float(), features.float()) / features.shape[-1] ** 0.5
    near = distance.sort(dim=1).values
    near = near[:, :count] if released else near[:, 1 : neighbors + 1]
    density = near.square().sum(1).div(max(1, near.shape[1])).neg().exp()
    gap = density_gap(distance, density, distance.amax() if released else None)
    centers = top(density * gap, count)
    group = distance[:, centers].argmin(1)
    group[centers] = torch.arange(count, device=features.device)
    return centers, group
