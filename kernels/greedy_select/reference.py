"""Sequential selection of tokens, in plain PyTorch."""

from typing import Literal

import torch
from torch import Tensor

Rule = Literal["diverse", "farthest", "dpp"]
RESIDUAL = 1e-6


def greedy_select(
    similarity: Tensor, scores: Tensor, k: int, rule: Rule, valid: Tensor | None = None
) -> Tensor:
    free = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid.clone()
    images = torch.arange(len(scores), device=scores.device)
    chosen = torch.full((len(scores), k), -1, device=scores.device)
    nearest = torch.full_like(scores, -torch.inf)
    residual = scores.square() * similarity.diagonal(dim1=1, dim2=2)
    basis = residual.new_empty(len(scores), k if rule == "dpp" else 0, scores.shape[1])
    for step in range(min(k, scores.shape[1])):
        if rule == "dpp":
            gain = torch.where(residual > RESIDUAL, residual, 0.0)
        elif step == 0:
            gain = scores
        else:
            gain = scores * (1 - nearest) if rule == "diverse" else -nearest
        gain = gain.masked_fill(~free, -torch.inf)
        pick = gain.argmax(1)
        chosen[:, step] = torch.where(free.any(1), pick, -1)
        free[images, pick] = False
        closest = similarity[images, pick]
        nearest = torch.maximum(nearest, closest)
        if rule == "dpp":
            size = residual[images, pick][:, None]
            past = basis[:, :step]
            row = scores[images, pick][:, None] * scores * closest
            row = row - (past[images, :, pick][..., None] * past).sum(1)
            part = torch.where(size > RESIDUAL, row / size.clamp_min(RESIDUAL).sqrt(), 0.0)
            basis[:, step] = part
            residual = residual - part.square()
    return chosen
