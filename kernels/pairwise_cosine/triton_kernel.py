"""Cosines in one launch: a tile's products and both sides' norms in one pass over the features."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlm_prune.kernels.attention_tiles import block_size, load_tile, tile_dtype, tile_width


@triton.jit
def _cosine_kernel(
    one, other, out, one_strides, other_strides, rows, columns, width,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Stores the cosines of one tile of pairs.

    Programs: (tiles of rows, tiles of columns, M). Products and both norms are summed in one pass
    over d.

    Args:
        one, other: (M, N, d) and (M, K, d), read by `one_strides` and `other_strides`.
        out: (M, N, K) in fp32.
        rows, columns, width: N, K and d.
    """
    image = tl.program_id(2).to(tl.int64)
    # one tile (BLOCK_N, BLOCK_K) of an image's (N, K) pairs
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    one += image * one_strides[0]
    other += image * other_strides[0]
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    left_squares = tl.zeros([BLOCK_N], tl.float32)
    right_squares = tl.zeros([BLOCK_K], tl.float32)
    # along the width; what is past its end is loaded as 0 and adds nothing
    for start in range(0, width, BLOCK_D):
        left = load_tile(
            one + start * one_strides[2], row, row < rows, one_strides, width - start, BLOCK_D
        )
        right = load_tile(
            other + start * other_strides[2], column, column < columns,
            other_strides, width - start, BLOCK_D,
        )  # fmt: skip
        total += tl.dot(left.to(DTYPE), tl.trans(right.to(DTYPE)), input_precision="ieee")
        left, right = left.to(tl.float32), right.to(tl.float32)
        left_squares += tl.sum(left * left, 1)
        right_squares += tl.sum(right * right, 1)
    # as torch's normalize: no norm is below 1e-12
    norms = tl.maximum(tl.sqrt(left_squares), 1e-12)[:, None]
    total /= norms * tl.maximum(tl.sqrt(right_squares), 1e-12)[None, :]
    # out is contiguous, (M, N, K)
    out += (image * rows + row[:, None]) * columns + column[None, :]
    tl.store(out, total, mask=(row < rows)[:, None] & (column < columns)[None, :])


def pairwise_cosine(one: Tensor, other: Tensor) -> Tensor:
    """Returns what `op.pairwise_cosine` describes, in one launch."""
    (images, rows, width), columns = one.shape, other.shape[1]
    out = torch.empty(images, rows, columns, dtype=torch.float32, device=one.device)
    if out.numel() == 0:
        return out
    tall, wide = block_size(rows), block_size(columns)
    grid = (triton.cdiv(rows, tall), triton.cdiv(columns, wide), images)
    _cosine_kernel[grid](
        one, other, out, one.stride(), other.stride(), rows, columns, width,
        BLOCK_N=tall, BLOCK_K=wide, BLOCK_D=min(128, tile_width(width)), DTYPE=tile_dtype(one),
    )  # fmt: skip
    return out
