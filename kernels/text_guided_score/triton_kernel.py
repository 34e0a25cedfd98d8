"""The text-guided score in two launches: normalizers and text prior, then the weighted columns."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlm_prune.kernels.attention_tiles import (
    block_size,
    load_tile,
    query_tile,
    row_lse,
    tile_dtype,
    tile_width,
    visible_logits,
    weighted_columns,
)
from vlm_prune.kernels.text_guided_score import reference


@triton.jit
def _prior_kernel(
    query, key, columns, key_positions, lse, row_sums, column_sums,
    query_strides, key_strides, scale, heads, group, queries, keys, width,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, DTYPE: tl.constexpr,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """Stores the softmax denominators of a tile of text rows, and the
    tile's part of the text prior.

    Programs: (tiles of text rows, B x H). Row sums leave the diagonal out; column sums of each tile
    are kept apart, so that their order of addition is fixed. A single tile adds its own to its row
    sums.

    Args:
        query, key: (B, H, T, d) and (B, G, N, d), read by `query_strides` and `key_strides`.
        columns: where the text rows stand among the keys, (B, T), -1 for padding.
        key_positions: an int8 mask of valid keys, (B, N).
        lse, row_sums: outputs, (B, H, T) in fp32.
        column_sums: output, (B, H, tiles, T) in fp32; None where there is one tile.
        heads, group: H, and how many heads share a key head.
        queries, keys, width: T, N and d.
    """
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    rows, real, query_at, q = query_tile(
        query, columns, query_strides, batch, head, queries, width, BLOCK_T, BLOCK_D, DTYPE
    )
    # text rows are keys, too: `columns` says which
    columns += batch * queries
    key += batch * key_strides[0] + head // group * key_strides[1]
    normalizer = row_lse(
        q, query_at, key, key_positions, batch * keys,
        key_strides, scale, keys, width, BLOCK_N, BLOCK_D, DTYPE, WINDOW,
    )  # fmt: skip
    tl.store(lse + row * queries + rows, normalizer, mask=real)
    if column_sums is not None:
        # (batch, head, tile, T): a row for each program, so that no two add to one number
        column_sums += (row * tl.num_programs(0) + tl.program_id(0)) * queries
    total = tl.zeros([BLOCK_T], tl.float32)
    # attention from this tile's text rows to all text rows, a tile at a time
    for start in range(0, queries, BLOCK_T):
        others = start + tl.arange(0, BLOCK_T)
        key_at = tl.load(columns + others, mask=others < queries, other=-1)
        tile = load_tile(key, key_at, key_at >= 0, key_strides, width, BLOCK_D).to(DTYPE)
        logits = visible_logits(q, query_at, tile, key_at, scale, WINDOW)
        attention = tl.exp(logits - normalizer[:, None])
        # the diagonal is in the column sums; in the row sums it would count twice
        total += tl.sum(tl.where(rows[:, None] == others[None, :], 0.0, attention), 1)
        if column_sums is None:
            total += tl.sum(attention, 0)
        else:
            tl.store(column_sums + others, tl.sum(attention, 0), mask=others < queries)
    tl.store(row_sums + row * queries + rows, total, mask=real)


def text_guided_score(
    query: Tensor,
    key: Tensor,
    columns: Tensor,
    key_valid: Tensor,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Returns what `op.text_guided_score` describes, in two launches."""
    (batch, heads, queries, width), (keys, groups) = query.shape, (key.shape[2], key.shape[1])
    if 0 in (batch, queries):
        return reference.text_guided_score(query, key, columns, key_valid, scale, window)
    key_at, columns = key_valid.contiguous().view(torch.int8), columns.int().contiguous()
    block = block_size(queries)
    tiles = triton.cdiv(queries, block)
    # what text rows pay and get within the text, in fp32
    lse, prior = torch.empty(2, batch, heads, queries, device=query.device)
    column_sums = None
    if tiles > 1:
        column_sums = torch.empty(batch, heads, tiles, queries, device=query.device)
    _prior_kernel[(tiles, batch * heads)](
        query, key, columns, key_at, lse, prior, column_sums,
        query.stride(), key.stride(), scale, heads, heads // groups, queries, keys, width,
        BLOCK_T=block, BLOCK_N=block_size(keys), BLOCK_D=tile_width(width), DTYPE=tile_dtype(query),
        WINDOW=window,
    )  # fmt: skip
    if column_sums is not None:
        prior = prior + column_sums.sum(2)
    return weighted_columns(query, key, columns, key_at, lse, prior, scale, window)
