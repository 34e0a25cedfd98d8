"""Sequential selection of tokens, in plain PyTorch."""

from typing import Literal

import torch
from torch import Tensor

SelectionRule = Literal["diverse", "farthest", "dpp", "coverage"]
SPENT = 10


def greedy_select(
    similarity: Tensor, scores: Tensor, k: int, rule: SelectionRule, valid: Tensor | None = None
) -> Tensor:
    """Returns what `op.greedy_select` describes, one step of all images after the other."""
    free = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid.clone()
    images = torch.arange(len(scores), device=scores.device)
    chosen = torch.full((len(scores), k), -1, device=scores.device)
    nearest = torch.full_like(scores, -torch.inf)
    covered = similarity.new_zeros(len(scores), similarity.shape[2])
    if rule == "dpp":
        # variance of each token that chosen ones do not explain yet; below `rounding` it is nothing else
        residual = scores.square() * similarity.diagonal(dim1=1, dim2=2)
        rounding = SPENT * torch.finfo(scores.dtype).eps * residual.amax(1, keepdim=True)
        factor = residual.new_empty(len(scores), k, scores.shape[1])
    for step in range(min(k, scores.shape[1])):
        if rule == "dpp":
            residual = torch.where(residual > rounding, residual, 0)
            gain = residual
        elif rule == "coverage":
            gain = scores * (similarity - covered[:, None]).clamp_(min=0).sum(-1)
        elif step == 0:
            gain = scores
        else:
            gain = (1 - nearest) * (scores if rule == "diverse" else 1)
        gain = gain.masked_fill(~free, -torch.inf)
        pick = gain.argmax(1)
        # images that have no free token left get -1
        chosen[:, step] = torch.where(free.any(1), pick, -1)
        free[images, pick] = False
        closest = similarity[images, pick]
        if rule == "coverage":
            covered = torch.maximum(covered, closest)
        else:
            nearest = torch.maximum(nearest, closest)
        if rule == "dpp":
            # one row of an incremental Cholesky factor of the kernel score x similarity x score
            known = factor[:, :step]
            row = scores[images, pick][:, None] * scores * closest
            row = row - (known[images, :, pick][:, None] @ known)[:, 0]
            root = residual[images, pick][:, None].sqrt()
            factor[:, step] = torch.where(root > 0, row / root, 0)
            residual = residual - factor[:, step].square()
    return chosen
