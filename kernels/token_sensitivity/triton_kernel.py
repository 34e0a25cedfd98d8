"""Sensitivity of a GELU projector: differences, second layer and norms in one launch each.

What lies between the layers, tokens x directions x width, is made tile by tile and never stored.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlm_prune.kernels.attention_tiles import block_size, load_tile, padded
from vlm_prune.kernels.token_sensitivity.reference import pre_activation


@triton.jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))


@triton.jit
def _gelu_slope(x):
    return 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(
        -0.5 * x * x
    )


@triton.jit
def _norms_kernel(
    before, shifts, w2, norms, w2_strides, factor, tokens, hidden, width,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """One program: the norms of a tile of tokens in one direction."""
    direction = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    real = rows < tokens
    squares = tl.zeros([BLOCK_T], tl.float32)
    for out in range(0, width, BLOCK_O):
        outputs = out + tl.arange(0, BLOCK_O)
        total = tl.zeros([BLOCK_T, BLOCK_O], tl.float32)
        for start in range(0, hidden, BLOCK_H):
            units = start + tl.arange(0, BLOCK_H)
            here = load_tile(before + start, rows, real, (hidden, 1), hidden - start, BLOCK_H)
            shift = tl.load(shifts + direction * hidden + units, mask=units < hidden, other=0.0)
            difference = _gelu(here + shift[None, :]) - _gelu(here - shift[None, :])
            weight = load_tile(
                w2 + start * w2_strides[1], outputs, outputs < width,
                w2_strides, hidden - start, BLOCK_H,
            )  # fmt: skip
            total += tl.dot(difference, tl.trans(weight.to(tl.float32)), input_precision="ieee")
        squares += tl.sum(total * total, 1)
    tl.store(norms + direction * tokens + rows, tl.sqrt(squares) * factor, mask=real)


@triton.jit
def _quadratic_kernel(
    before, kernel, parts, tokens, hidden, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr
):
    """One program: a tile of tokens' share of d^T K d from one tile of K's columns."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    real, first = rows < tokens, tl.program_id(1) * BLOCK_H
    total = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    for start in range(0, hidden, BLOCK_H):
        units = start + tl.arange(0, BLOCK_H)
        here = load_tile(before + start, rows, real, (hidden, 1), hidden - start, BLOCK_H)
        tile = load_tile(
            kernel + first, units, units < hidden, (hidden, 1), hidden - first, BLOCK_H
        )
        total += tl.dot(_gelu_slope(here), tile, input_precision="ieee")
    here = load_tile(before + first, rows, real, (hidden, 1), hidden - first, BLOCK_H)
    share = tl.sum(total * _gelu_slope(here), 1)
    tl.store(parts + tl.program_id(1) * tokens + rows, share, mask=real)


def monte_carlo(
    features: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    activation: Callable[[Tensor], Tensor],
    w2: Tensor,
    bank: Tensor,
    step: float,
) -> Tensor:
    before = pre_activation(features, w1, b1)
    shifts = (pre_activation(bank, w1, None) * step).contiguous()
    flat = before.flatten(0, -2).contiguous()
    (tokens, hidden), directions, width = flat.shape, len(shifts), len(w2)
    if tokens == 0:
        return flat.new_empty(before.shape[:-1])
    norms = torch.empty(directions, tokens, device=flat.device)
    block = block_size(tokens)
    _norms_kernel[(triton.cdiv(tokens, block), directions)](
        flat, shifts, w2, norms, w2.stride(), 1 / (2 * step), tokens, hidden, width,
        BLOCK_T=block, BLOCK_H=block_size(hidden, 32), BLOCK_O=block_size(width),
    )  # fmt: skip
    return norms.mean(0).view(before.shape[:-1])


def closed_form(
    features: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    activation: Callable[[Tensor], Tensor],
    kernel: Tensor,
) -> Tensor:
    before = pre_activation(features, w1, b1)
    flat = before.flatten(0, -2).contiguous()
    tokens, hidden = flat.shape
    if tokens == 0:
        return flat.new_empty(before.shape[:-1])
    block, step = block_size(tokens), padded(min(hidden, 32))
    tiles = triton.cdiv(hidden, step)
    parts = torch.empty(tiles, tokens, device=flat.device)
    _quadratic_kernel[(triton.cdiv(tokens, block), tiles)](
        flat, kernel.contiguous(), parts, tokens, hidden, BLOCK_T=block, BLOCK_H=step
    )
    squared = parts.sum(0) / features.shape[-1]
    return squared.clamp_min(0).sqrt().view(before.shape[:-1])
