"""Choosing and merging tokens by importance and diversity, on plain tensors."""

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot


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
    the lowest index. One N x N similarity matrix per image, then k steps of O(N).
    """
    return _diverse(scores, scores, cosine(features, features), k)


def max_min(features: Tensor, k: int) -> Tensor:
    """Greedy max-min of cosine distances, first the token farthest from its nearest neighbour.

    Shapes: (M, N, d) -> (M, k) in the order chosen. Ties go to the lowest index.
    """
    similarity = cosine(features, features)
    diagonal = torch.eye(similarity.shape[1], dtype=torch.bool, device=similarity.device)
    isolation = 1 - similarity.masked_fill(diagonal, -torch.inf).amax(-1)
    return _diverse(isolation, torch.ones_like(isolation), similarity, k)


def _diverse(first: Tensor, scores: Tensor, similarity: Tensor, k: int) -> Tensor:
    nearest = torch.zeros_like(scores)
    free = torch.ones_like(scores, dtype=torch.bool)
    rows, chosen = torch.arange(len(scores), device=scores.device), []
    for step in range(k):
        gain = first if step == 0 else scores * (1 - nearest)
        pick = gain.masked_fill(~free, -torch.inf).argmax(-1)
        chosen.append(pick)
        free[rows, pick] = False
        closest = similarity[rows, pick]
        nearest = closest if step == 0 else torch.maximum(nearest, closest)
    return torch.stack(chosen, -1)


def dpp(kernel: Tensor, k: int) -> Tensor:
    """Greedy maximum-a-posteriori set of a determinantal point process.

    https://arxiv.org/abs/1709.05135: each step adds the token that multiplies the determinant
    most, by one row of an incremental Cholesky factor, O(k^2 N) in all. Once the kernel's rank is
    spent every gain is zero and the lowest indices follow.

    Shapes: positive semi-definite kernel (M, N, N) -> (M, k) in the order chosen.
    """
    gain = kernel.diagonal(dim1=1, dim2=2).clone()
    spent = 10 * torch.finfo(kernel.dtype).eps * gain.amax(1, keepdim=True)
    free = torch.ones_like(gain, dtype=torch.bool)
    factor = gain.new_zeros(len(gain), k, gain.shape[1])
    rows, chosen = torch.arange(len(gain), device=gain.device), []
    for step in range(k):
        gain = torch.where(gain > spent, gain, 0)
        pick = gain.masked_fill(~free, -torch.inf).argmax(-1)
        chosen.append(pick)
        free[rows, pick] = False
        known = factor[:, :step]
        row = kernel[rows, pick] - (known[rows, :, pick][:, None] @ known)[:, 0]
        root = gain[rows, pick][:, None].sqrt()
        factor[:, step] = torch.where(root > 0, row / root, 0)
        gain = gain - factor[:, step].square()
    return torch.stack(chosen, -1)


def averaged(kept: Tensor, dropped: Tensor, nearest: Tensor) -> Tensor:
    """Each kept token averaged with the dropped ones that are assigned to it.

    Shapes: kept (M, k, d), dropped (M, n, d), nearest (M, n) indices of kept tokens -> (M, k, d).
    """
    member = one_hot(nearest, kept.shape[1]).to(torch.float32)
    total = kept.float() + member.transpose(1, 2) @ dropped.float()
    return (total / (1 + member.sum(1)[..., None])).to(kept.dtype)
