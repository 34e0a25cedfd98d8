"""Rotation of queries and keys of learners at their positions."""

import torch
from torch import Tensor

Tables = tuple[Tensor, Tensor]
Rotary = Tables | Tensor


def rotation_matrix(cos: Tensor, sin: Tensor) -> Tensor:
    """Returns what a row vector is multiplied by instead of rotating it, (B or 1, d, d).

    Of one token per row this is faster: one small product for all heads, and the matrix is made
    once for all layers.

    Args:
        cos: of one token per row, (B or 1, 1, d).
        sin: likewise.
    """
    half = cos.shape[-1] // 2
    # column j of the first half takes sin times minus entry j + d / 2, of the second plus j - d / 2
    upper, lower = torch.diag_embed(sin[:, 0, :half]), torch.diag_embed(sin[:, 0, half:])
    matrix = torch.diag_embed(cos[:, 0])
    matrix[:, half:, :half] -= upper
    matrix[:, :half, half:] += lower
    return matrix


def rotated(heads: Tensor, rotary: Rotary) -> Tensor:
    """Applies rotary position embedding to (B, N, H, d), with cos and sin tables (B or 1, N, d), or
    for N = 1 with their `rotation_matrix`.
    """
    if isinstance(rotary, Tensor):
        return heads @ rotary[:, None].to(heads.dtype)
    cos, sin = (table[:, :, None].to(heads.dtype) for table in rotary)
    first, second = heads.chunk(2, -1)
    turned = heads * cos
    if turned.requires_grad:
        return torch.addcmul(turned, torch.cat([-second, first], -1), sin)
    # in place, half by half: at small widths the passes over wide tensors are what rotation costs
    upper, lower = turned.chunk(2, -1)
    sin_upper, sin_lower = sin.chunk(2, -1)
    upper.addcmul_(second, sin_upper, value=-1)
    lower.addcmul_(first, sin_lower)
    return turned
