"""Sensitivity of a GELU projector: all that is elementwise or a sum over a row is fused.

Matrix products are the library's, in the dtype of the weights; what stands between them is in fp32.
"""

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlm_prune.kernels.token_sensitivity import reference
from vlm_prune.kernels.token_sensitivity.reference import bands, pre_activation

PRODUCTS = 2048  # numbers of a token that directions taken together make
DIFFERENCES = 1 << 25  # held at once: 64 MB of them in half precision, about an H100's L2 cache


@triton.jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))


@triton.jit
def _gelu_slope(x):
    return 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(
        -0.5 * x * x
    )


@triton.jit
def _pre_activations(before, bias, row, units, real, hidden, BIASED: tl.constexpr):
    """Loads a part of one token's first layer, with its bias, in fp32.

    Args:
        before: the layer without its bias, (N, h).
        bias: (h,); not read unless `BIASED`.
        row: index of the token.
        units, real: indices of the part, and which of them exist.
        hidden: h.
    """
    inputs = tl.load(before + row * hidden + units, mask=real, other=0.0).to(tl.float32)
    if BIASED:
        inputs += tl.load(bias + units, mask=real, other=0.0).to(tl.float32)
    return inputs


@triton.jit
def _differences_kernel(
    before, bias, shifts, out, tokens, hidden, factor, BIASED: tl.constexpr, BLOCK: tl.constexpr
):
    """Stores a part of one token's difference quotient along one direction.

    Programs: (N, parts of h, directions).

    Args:
        before, bias: the first layer without its bias (N, h), and the bias (h,).
        shifts: of the pre-activation along each direction, (c, h).
        out: (c, N, h).
        factor: 1 / (2 step).
    """
    row, direction = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    units = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = units < hidden
    inputs = _pre_activations(before, bias, row, units, real, hidden, BIASED)
    shift = tl.load(shifts + direction * hidden + units, mask=real, other=0.0)
    # out is (directions, N, h)
    out += (direction * tokens + row) * hidden
    tl.store(out + units, (_gelu(inputs + shift) - _gelu(inputs - shift)) * factor, mask=real)


@triton.jit
def _slopes_kernel(before, bias, out, hidden, BIASED: tl.constexpr, BLOCK: tl.constexpr):
    """Stores GELU's derivative at a part of one token's first layer.

    Programs: (N, parts of h).

    Args:
        before, bias: the layer without its bias (N, h), and the bias (h,).
        out: (N, h).
        hidden: h.
    """
    row = tl.program_id(0).to(tl.int64)
    units = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = units < hidden
    inputs = _pre_activations(before, bias, row, units, real, hidden, BIASED)
    tl.store(out + row * hidden + units, _gelu_slope(inputs), mask=real)


@triton.jit
def _row_roots_kernel(one, other, out, width, divisor, BLOCK: tl.constexpr):
    """Stores sqrt(<one, other> / divisor) of one row; one and other are (R, w), out (R,)."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        left = tl.load(one + row * width + columns, mask=columns < width, other=0.0)
        right = tl.load(other + row * width + columns, mask=columns < width, other=0.0)
        total += left.to(tl.float32) * right.to(tl.float32)
    tl.store(out + row, tl.sqrt(tl.maximum(tl.sum(total, 0) / divisor, 0.0)))


def _row_roots(one: Tensor, other: Tensor, divisor: float) -> Tensor:
    """Returns sqrt(<one, other> / divisor) of each row, (R, w), (R, w) -> (R,), in fp32."""
    out = torch.empty(len(one), dtype=torch.float32, device=one.device)
    width = one.shape[1]
    _row_roots_kernel[(len(one),)](one, other, out, width, divisor, BLOCK=_block(width))
    return out


def _block(width: int) -> int:
    return min(1024, int(triton.next_power_of_2(width)))


def _first_layer(features: Tensor, w1: Tensor) -> Tensor:
    """Returns the first layer's output without its bias, one row per token, (N, h)."""
    dtype = torch.promote_types(features.dtype, w1.dtype)
    return (features.to(dtype).flatten(0, -2) @ w1.to(dtype).T).contiguous()


def weight_root(w2: Tensor) -> Tensor:
    """Returns what `op.weight_root` describes, in the dtype of the weights."""
    return reference.weight_root(w2).to(w2.dtype)


def weight_kernel(w1: Tensor, w2: Tensor) -> Tensor:
    """Returns what `op.weight_kernel` describes; bf16, which has its range, for half precision."""
    kernel = reference.weight_kernel(w1, w2)
    return kernel if w2.dtype == torch.float32 else kernel.to(torch.bfloat16)


def monte_carlo(
    features: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    activation: Callable[[Tensor], Tensor],
    root: Tensor,
    bank: Tensor,
    step: float,
) -> Tensor:
    """Returns what `op.monte_carlo` describes for GELU, in chunks of directions."""
    before = _first_layer(features, w1)
    shifts = (pre_activation(bank, w1, None) * step).contiguous()
    (tokens, hidden), directions = before.shape, len(shifts)
    norms = torch.empty(directions, tokens, dtype=torch.float32, device=before.device)
    if tokens == 0:
        return norms.sum(0).view(features.shape[:-1])
    # as many directions at once as keep the differences in the cache
    chunk, block = max(1, DIFFERENCES // before.numel()), _block(hidden)
    for first in range(0, directions, chunk):
        part = shifts[first : first + chunk]
        moved = torch.empty(len(part) * tokens, hidden, dtype=root.dtype, device=before.device)
        _differences_kernel[(tokens, triton.cdiv(hidden, block), len(part))](
            before, b1, part, moved, tokens, hidden, 0.5 / step,
            BIASED=b1 is not None, BLOCK=block,
        )  # fmt: skip
        out = moved.new_empty(len(moved), len(root))
        # the root is triangular: a band of its rows needs the columns from its first row on
        for rows in bands(root):
            torch.mm(moved[:, rows.start :], root[rows, rows.start :].T, out=out[:, rows])
        norms[first : first + chunk] = _row_roots(out, out, 1).view(-1, tokens)
    return norms.mean(0).view(features.shape[:-1])


def _slopes(before: Tensor, b1: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Returns GELU's derivative (N, h) in `dtype`.

    Args:
        before: first layer without its bias, (N, h).
        b1: the bias (h,), or None.
        dtype: of the result.
    """
    tokens, hidden = before.shape
    slopes = torch.empty(tokens, hidden, dtype=dtype, device=before.device)
    block = _block(hidden)
    _slopes_kernel[(tokens, triton.cdiv(hidden, block))](
        before, b1, slopes, hidden, BIASED=b1 is not None, BLOCK=block
    )
    return slopes


def moved_roots(w1: Tensor, root: Tensor, bank: Tensor) -> Iterator[Tensor]:
    """Yields the maps from an activation's derivative (h,) to the output's along directions, several at
    once: root * (W1 u), (c, r, h).

    Args:
        w1: weights of the first layer, (h, d_v).
        root: of the second layer, (r, h).
        bank: directions u, (m, d_v).
    """
    shifts, count = pre_activation(bank, w1, None), max(1, PRODUCTS // max(1, len(root)))
    return (root * part[:, None].to(root.dtype) for part in shifts.split(count))


def directional(
    features: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    activation: Callable[[Tensor], Tensor],
    root: Tensor,
    bank: Tensor,
) -> Tensor:
    """Returns what `op.directional` describes for GELU."""
    before = _first_layer(features, w1)
    norms = before.new_zeros(len(before), dtype=torch.float32)
    if len(before) == 0:
        return norms.view(features.shape[:-1])
    slopes = _slopes(before, b1, root.dtype)
    for maps in moved_roots(w1, root, bank):
        # (N, h) @ (h, c r) -> (N c, r), one row for each token and direction
        moved = (slopes @ maps.flatten(0, 1).T).view(-1, len(root))
        norms += _row_roots(moved, moved, 1).view(len(before), -1).sum(1)
    return (norms / len(bank)).view(features.shape[:-1])


def closed_form(
    features: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    activation: Callable[[Tensor], Tensor],
    kernel: Tensor,
) -> Tensor:
    """Returns what `op.closed_form` describes for GELU."""
    before = _first_layer(features, w1)
    if len(before) == 0:
        return before.new_empty(features.shape[:-1], dtype=torch.float32)
    slopes = _slopes(before, b1, kernel.dtype)
    roots = _row_roots(slopes, slopes @ kernel, features.shape[-1])
    return roots.view(features.shape[:-1])
