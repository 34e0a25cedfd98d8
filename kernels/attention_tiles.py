"""Triton parts that the attention kernels share; the rule of visibility is that of `visible`."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def load_tile(base, rows, seen, strides, width, BLOCK: tl.constexpr):
    """Loads rows (R, BLOCK) of a matrix, zeros where `seen` is false or past `width` columns.

    Args:
        base: pointer to the matrix.
        rows: indices of the rows, (R,).
        seen: which of them are loaded, (R,).
        strides: the last two are those of rows and columns.
        width: columns of the matrix.
    """
    # strides may be those of a view, so that nothing has to be contiguous
    columns = tl.arange(0, BLOCK)
    offsets = rows[:, None] * strides[-2] + columns[None, :] * strides[-1]
    return tl.load(base + offsets, mask=seen[:, None] & (columns < width)[None, :], other=0.0)


@triton.jit
def positions_of(positions, first, rows, real):
    """Returns the positions of rows, (R,), and -1 for rows that are not real.

    Without positions all rows are at 0, so that all see all.

    Args:
        positions: pointer to int32 positions, to an int8 mask of rows that then stand at their
            indices, or None.
        first: offset of row 0.
        rows: indices of the rows, (R,).
        real: which of them exist, (R,).
    """
    if positions is None:
        at = tl.where(real, 0, -1)
    elif positions.dtype.element_ty == tl.int8:
        # a mask: valid rows stand at their indices
        at = tl.where(tl.load(positions + first + rows, mask=real, other=0) != 0, rows, -1)
    else:
        at = tl.load(positions + first + rows, mask=real, other=-1)
    return at


@triton.jit
def query_tile(
    query, positions, strides, batch, head, queries, width,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Loads the tile of queries that belongs to this program.

    Returns the rows' indices, which rows exist, their positions (-1 for those that do not), all
    (R,), and the tile (R, BLOCK_D).

    Args:
        query: pointer to (B, H, T, d), read by `strides`.
        positions: as for `positions_of`.
        batch, head: of the program.
        queries, width: T and d.
    """
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    real = rows < queries
    # positions are (B, T), shared by all heads of a row of the batch
    at = positions_of(positions, batch * queries, rows, real)
    # the pointer moves to (batch, head); rows and columns follow in load_tile
    query += batch * strides[0] + head * strides[1]
    return rows, real, at, load_tile(query, rows, real, strides, width, BLOCK_D).to(DTYPE)


@triton.jit
def visible_logits(query, query_at, key, key_at, scale, WINDOW: tl.constexpr = None):
    """Returns scaled fp32 products (R, N) of two tiles, -inf where a row does not see a key.

    Args:
        query, key: (R, d) and (N, d).
        query_at, key_at: positions (R,) and (N,); -1 is padding.
        scale: factor of the products.
        WINDOW: how many positions a query sees, its own among them; None for all.
    """
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
    # causal: keys at the query's position or before, without padding
    seen = (key_at[None, :] <= query_at[:, None]) & (key_at[None, :] >= 0)
    if WINDOW is not None:
        seen = seen & (key_at[None, :] > query_at[:, None] - WINDOW)
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def row_lse(
    query, query_at, key, key_positions, first, key_strides, scale, keys, width,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, DTYPE: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Returns the logarithm of the softmax denominator of each row (R,),
    +inf for a row that sees no key.

    The sum runs over tiles of keys and is scaled down whenever a larger logit comes.

    Args:
        query, query_at: a tile (R, d) and its positions (R,).
        key: pointer to one head's keys (N, d), read by `key_strides`.
        key_positions: of the keys, as for `positions_of`.
        first: offset of the image's first key among all key positions.
        scale: factor of the products.
        keys, width: N and d.
    """
    high = tl.full(query_at.shape, float("-inf"), tl.float32)
    total = tl.zeros(query_at.shape, tl.float32)
    for start in range(0, keys, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        key_at = positions_of(key_positions, first, rows, rows < keys)
        tile = load_tile(key, rows, rows < keys, key_strides, width, BLOCK_D)
        logits = visible_logits(query, query_at, tile.to(DTYPE), key_at, scale, WINDOW)
        # sums so far are brought to the new maximum; where no key was seen yet, it is 0, not -inf
        top = tl.maximum(high, tl.max(logits, 1))
        base = tl.where(top == float("-inf"), 0.0, top)
        total = total * tl.exp(high - base) + tl.sum(tl.exp(logits - base[:, None]), 1)
        high = top
    return tl.where(total > 0, high + tl.log(tl.where(total > 0, total, 1.0)), float("inf"))


@triton.jit
def _weighted_columns_kernel(
    query, key, query_positions, key_positions, lse, weights, out,
    even, query_strides, key_strides, scale, heads, group, queries, keys, width,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, DTYPE: tl.constexpr,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """Stores the weighted attention that each key of one tile receives, for one head.

    Programs: (tiles of keys, B x H).

    Args:
        query, key: (B, H, T, d) and (B, G, N, d), read by `query_strides` and `key_strides`.
        query_positions, key_positions: as for `positions_of`.
        lse: logarithms of the rows' softmax denominators, (B, H, T).
        weights: of the queries, (B, H, T), or None where each weighs `even`.
        out: (B, H, N) in fp32.
        heads, group: H, and how many heads share a key head.
        queries, keys, width: T, N and d.
    """
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    # this program's tile of keys, and the key head that its query head shares
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < keys
    key_at = positions_of(key_positions, batch * keys, columns, inside)
    key += batch * key_strides[0] + head // group * key_strides[1]
    tile = load_tile(key, columns, inside, key_strides, width, BLOCK_D).to(DTYPE)
    # over all tiles of queries, so that no two programs add to the same column
    query += batch * query_strides[0] + head * query_strides[1]
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, queries, BLOCK_T):
        rows = start + tl.arange(0, BLOCK_T)
        real = rows < queries
        query_at = positions_of(query_positions, batch * queries, rows, real)
        # +inf makes the attention of rows that do not exist 0
        normalizer = tl.load(lse + row * queries + rows, mask=real, other=float("inf"))
        q = load_tile(query, rows, real, query_strides, width, BLOCK_D).to(DTYPE)
        logits = visible_logits(q, query_at, tile, key_at, scale, WINDOW)
        attention = tl.exp(logits - normalizer[:, None])
        if weights is not None:
            weight = tl.load(weights + row * queries + rows, mask=real, other=0.0)
            attention *= weight[:, None]
        total += tl.sum(attention, 0)
    if weights is None:
        total *= even
    tl.store(out + row * keys + columns, total, mask=inside)


def weighted_columns(
    query: Tensor,
    key: Tensor,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    lse: Tensor,
    weights: Tensor | None,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Returns the sum over heads and queries of a query's weight times its attention, (B, N) in fp32.

    Args:
        query: (B, H, T, d).
        key: (B, G, N, d), H a multiple of G.
        query_positions: (B, T) int32; without positions all see all.
        key_positions: (B, N) int32, or an int8 mask of valid keys, which then stand at their
            indices.
        lse: log of each row's softmax denominator, (B, H, T) in fp32.
        weights: of the queries, (B, H, T) in fp32; None takes the mean.
        scale: factor of the products.
        window: how many positions a query sees, its own among them; None for all.
    """
    (batch, heads, queries, width), (keys, groups) = query.shape, (key.shape[2], key.shape[1])
    out = torch.empty(batch, heads, keys, device=query.device)
    block = block_size(keys)
    _weighted_columns_kernel[(triton.cdiv(keys, block), batch * heads)](
        query, key, query_positions, key_positions, lse, weights, out,
        1 / (heads * queries), query.stride(), key.stride(), scale, heads, heads // groups, queries, keys, width,
        BLOCK_T=block_size(queries), BLOCK_N=block, BLOCK_D=tile_width(width), DTYPE=tile_dtype(query),
        WINDOW=window,
    )  # fmt: skip
    # over heads in a fixed order
    return out.sum(1)


def tile_width(size: int) -> int:
    """Returns the tile width that holds `size` columns: a power of two,
    at least 16 as `tl.dot` needs.
    """
    return max(16, int(triton.next_power_of_2(size)))


def block_size(rows: int, most: int = 64) -> int:
    """Returns how many rows a tile has: the power of two that holds `rows`, at most `most`."""
    return min(most, tile_width(rows))


def tile_dtype(tensor: Tensor) -> tl.dtype:
    """Returns the dtype in which a tile is multiplied, with sums in fp32: the tensor's own.

    Triton's interpreter multiplies in fp32; its `tl.dot` does not know bf16.
    """
    if not isinstance(load_tile, triton.JITFunction):
        return tl.float32
    return getattr(tl, str(tensor.dtype).removeprefix("torch."))
