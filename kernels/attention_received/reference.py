"""Mean attention that each key receives, in plain PyTorch."""

from itertools import product

import torch
from torch import Tensor

from vlm_prune.kernels.visible import at_least_fp32, share_heads, visible_softmax

# Weights of a tile stay in a cache, and in memory that the allocator keeps: more is mapped anew each time.
_HEADS, _ROWS = 8, 64


def attention_received(
    query: Tensor,
    key: Tensor,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Returns what `op.attention_received` describes, 64 rows of 8 heads at a time."""
    query, key = at_least_fp32(query), at_least_fp32(share_heads(key, query))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    total = key.new_zeros(key.shape[0], key.shape[2])
    # queries without padding; all of them where there are no positions
    count: int | Tensor = query.shape[2]
    for head, start in product(range(0, query.shape[1], _HEADS), range(0, query.shape[2], _ROWS)):
        heads, rows = slice(head, head + _HEADS), slice(start, start + _ROWS)
        scores = (query[:, heads, rows] * scale) @ key[:, heads].transpose(-1, -2)
        if query_positions is None or key_positions is None:
            weights = scores.softmax(-1)
        else:
            weights = visible_softmax(scores, query_positions[:, rows], key_positions, window)
        total += weights.sum(dim=(1, 2))
    if query_positions is not None:
        count = (query_positions >= 0).sum(1, keepdim=True)
    return total / torch.as_tensor(count * query.shape[1], device=total.device).clamp_min(1)
