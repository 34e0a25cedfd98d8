"""Choosing and merging tokens by importance and diversity, on plain tensors."""

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from vlm_prune.kernels.greedy_select import greedy_select


def min_max(scores: Tensor) -> Tensor:
    """Scale each row of (M, N) to [0, 1]; a constant row becomes ones."""
    low, high = scores.amin(-1, keepdim=True), scores.amax(-1, keepdim=True)
    return torch.where(high > low, (scores - low) / (high - low + 1e-8), torch.ones_like(scores))


def cosine(one: Tensor, other: Tensor) -> Tensor:
    """Cosine of every pair, in at least fp32; (M, N, d), (M, K, d) -> (M, N, K)."""
    work = torch.promote_types(one.dtype, torch.float32)
    return normalize(one.to(work), dim=-1) @ normalize(other.to(work), dim=-1).transpose(-1, -2)


def others(indices: Tensor, count: int) -> Tensor:
    """The indices below `count` that are not given, ascending; (M, k) -> (M, count - k)."""
    free = torch.ones(len(indices), count, dtype=torch.bool, device=indices.device)
    free.scatter_(1, indices, False)
    return free.nonzero()[:, 1].view(len(indices), count - indices.shape[1])


def diverse(scores: Tensor, features: Tensor, k: int) -> Tensor:
    """Greedy argmax of score x (1 - largest cosine to a chosen token), first the best score.

    Shapes: scores (M, N) in [0, 1], features (M, N, d) -> (M, k) in the order chosen. Ties go to
    the lowest index.
    """
    return greedy_select(cosine(features, features), scores, k, "diverse")


def max_min(features: Tensor, k: int) -> Tensor:
    """Greedy max-min of cosine distances, first the token farthest from its nearest neighbour.

    Shapes: (M, N, d) -> (M, k) in the order chosen. Ties go to the lowest index.
    """
    similarity = cosine(features, features)
    diagonal = torch.eye(similarity.shape[1], dtype=torch.bool, device=similarity.device)
    isolation = 1 - similarity.masked_fill(diagonal, -torch.inf).amax(-1)
    return greedy_select(similarity, isolation, k, "farthest")


def dpp(kernel: Tensor, k: int) -> Tensor:
    """Greedy maximum-a-posteriori set of a determinantal point process.

    Shapes: positive semi-definite kernel (M, N, N) -> (M, k) in the order chosen.
    """
    return greedy_select(kernel, torch.ones_like(kernel[:, 0]), k, "dpp")


def averaged(kept: Tensor, dropped: Tensor, nearest: Tensor) -> Tensor:
    """Each kept token averaged with the dropped ones that are assigned to it.

    Shapes: kept (M, k, d), dropped (M, n, d), nearest (M, n) indices of kept tokens -> (M, k, d).
    """
    member = one_hot(nearest, kept.shape[1]).to(torch.float32)
    total = kept.float() + member.transpose(1, 2) @ dropped.float()
    return (total / (1 + member.sum(1)[..., None])).to(kept.dtype)
