"""Attention received in two launches: the rows' normalizers, then the columns' sums."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlm_prune.kernels.attention_received import reference
from vlm_prune.kernels.attention_tiles import (
    block_size,
    query_tile,
    row_lse,
    tile_dtype,
    tile_width,
    weighted_columns,
)


@triton.jit
def _lse_kernel(
    query, key, query_positions, key_positions, lse,
    query_strides, key_strides, scale, heads, group, queries, keys, width,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, DTYPE: tl.constexpr,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """Stores the logarithm of the softmax denominator of each row of one
    tile of queries, for one head.

    Programs: (tiles of queries, B x H).

    Args:
        query, key: (B, H, T, d) and (B, G, N, d), read by `query_strides` and `key_strides`.
        query_positions, key_positions: (B, T) and (B, N) int32, or None where all see all.
        lse: output, (B, H, T) in fp32.
        scale: factor of the products.
        heads, group: H, and how many heads share a key head.
        queries, keys, width: T, N and d.
        WINDOW: how many positions a query sees, or None for all.
    """
    # programs of the second axis are numbered (batch, head); int64 for offsets beyond 2^31
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    rows, real, query_at, q = query_tile(
        query, query_positions, query_strides, batch, head, queries, width, BLOCK_T, BLOCK_D, DTYPE
    )
    # `group` query heads share one key head
    key += batch * key_strides[0] + head // group * key_strides[1]
    normalizer = row_lse(
        q, query_at, key, key_positions, batch * keys,
        key_strides, scale, keys, width, BLOCK_N, BLOCK_D, DTYPE, WINDOW,
    )  # fmt: skip
    tl.store(lse + row * queries + rows, normalizer, mask=real)


def attention_received(
    query: Tensor,
    key: Tensor,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Returns what `op.attention_received` describes, in two launches."""
    (batch, heads, queries, width), (keys, groups) = query.shape, (key.shape[2], key.shape[1])
    if 0 in (batch, queries, keys):
        return reference.attention_received(
            query, key, query_positions, key_positions, scale, window
        )
    device, factor = query.device, width**-0.5 if scale is None else scale
    query_at = key_at = weights = None
    if query_positions is not None and key_positions is not None:
        query_at, key_at = query_positions.int().contiguous(), key_positions.int().contiguous()
        # a mean over heads and the queries that are no padding
        real = (query_at >= 0).float()
        share = real / (heads * real.sum(1, keepdim=True)).clamp_min(1)
        weights = share[:, None].expand(-1, heads, -1).contiguous()
    lse = torch.empty(batch, heads, queries, device=device)
    block = block_size(queries)
    _lse_kernel[(triton.cdiv(queries, block), batch * heads)](
        query, key, query_at, key_at, lse,
        query.stride(), key.stride(), factor, heads, heads // groups, queries, keys, width,
        BLOCK_T=block, BLOCK_N=block_size(keys), BLOCK_D=tile_width(width), DTYPE=tile_dtype(query),
        WINDOW=window,
    )  # fmt: skip
    return weighted_columns(query, key, query_at, key_at, lse, weights, factor, window)
