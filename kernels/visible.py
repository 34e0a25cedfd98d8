"""Attention weights of chosen queries under one rule of visibility, shared by the references.

A query sees the keys at its own position or before, of these the last ones where there is a window;
a negative position is padding, which sees nothing and is seen by nothing.
"""

import torch
from torch import Tensor


def visible_softmax(
    scores: Tensor, query_positions: Tensor, key_positions: Tensor, window: int | None = None
) -> Tensor:
    """Returns the softmax over the keys that each query sees; a row that sees none is zero.

    Args:
        scores: products of queries and keys (B, H, T, N).
        query_positions: (B, T).
        key_positions: (B, N).
        window: how many positions a query sees, its own among them; None for all.
    """
    # (B, 1, N) against (B, T, 1)
    keys, queries = key_positions[:, None], query_positions[..., None]
    seen = (keys <= queries) & (keys >= 0)
    if window is not None:
        seen &= keys > queries - window
    seen = seen[:, None]
    return scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1) * seen


def share_heads(heads: Tensor, query: Tensor) -> Tensor:
    """Repeats grouped key or value heads (B, G, N, d) to the query's (B, H, N, d); as many stay as they are."""
    if heads.shape[1] == query.shape[1]:
        return heads
    return heads.repeat_interleave(query.shape[1] // heads.shape[1], dim=1)


def at_least_fp32(tensor: Tensor) -> Tensor:
    """Returns the tensor in fp32, or in its own dtype where that is more precise."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
