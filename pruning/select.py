"""Choosing tokens by importance and diversity, on plain tensors."""

import torch
from torch import Tensor
from torch.nn.functional import normalize


def min_max(scores: Tensor) -> Tensor:
    """Scale each row of (M, N) to [0, 1]; a constant row becomes ones."""
    low, high = scores.amin(-1, keepdim=True), scores.amax(-1, keepdim=True)
    return torch.where(high > low, (scores - low) / (high - low + 1e-8), torch.ones_like(scores))


def diverse(scores: Tensor, features: Tensor, k: int) -> Tensor:
    """Greedy argmax of score x (1 - largest cosine to a chosen token), first the best score.

    Shapes: scores (M, N) in [0, 1], features (M, N, d) -> (M, k) in the order chosen. Ties go to
    the lowest index. One N x N similarity matrix per image, then k steps of O(N).
    """
    unit = normalize(features.float(), dim=-1)
    similarity = unit @ unit.transpose(-1, -2)
    nearest = torch.zeros_like(scores)
    free = torch.ones_like(scores, dtype=torch.bool)
    rows, chosen = torch.arange(len(scores), device=scores.device), []
    for step in range(k):
        gain = scores if step == 0 else scores * (1 - nearest)
        pick = gain.masked_fill(~free, -torch.inf).argmax(-1)
        chosen.append(pick)
        free[rows, pick] = False
        closest = similarity[rows, pick]
        nearest = closest if step == 0 else torch.maximum(nearest, closest)
    return torch.stack(chosen, -1)
