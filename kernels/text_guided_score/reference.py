"""AdaptInfer's text-guided score, in plain PyTorch."""

import torch
from torch import Tensor

from vlm_prune.kernels.visible import at_least_fp32, share_heads, visible_softmax


def text_guided_score(
    query: Tensor,
    key: Tensor,
    columns: Tensor,
    key_valid: Tensor,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Returns what `op.text_guided_score` describes, with the text rows of attention in memory."""
    query, key = at_least_fp32(query), at_least_fp32(share_heads(key, query))
    positions = torch.arange(key.shape[2], device=key.device)
    scores = query @ key.transpose(-1, -2) * scale
    attention = visible_softmax(scores, columns, torch.where(key_valid, positions, -1), window)
    # (B, H, T, T): what text rows pay text rows; padding is column 0 here and masked
    index = columns.clamp_min(0)[:, None, None].expand(-1, *attention.shape[1:3], -1)
    to_text = attention.gather(3, index) * (columns >= 0)[:, None, None]
    # column sums and row sums of A + A^T, whose diagonal counts once
    diagonal = to_text.diagonal(dim1=-2, dim2=-1)
    prior = to_text.sum(-2) + to_text.sum(-1) - diagonal
    return (prior[..., None] * attention).sum(dim=(1, 2))
