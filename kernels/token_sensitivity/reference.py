"""How much a two-layer projector's output moves with each token, in plain PyTorch."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from vlm_prune.kernels.visible import at_least_fp32

ROWS = 1024  # products of tokens and directions that are taken together


def pre_activation(features: Tensor, w1: Tensor, b1: Tensor | None) -> Tensor:
    """Returns the first layer's output (..., h), in at least fp32.

    Args:
        features: (..., d_v).
        w1: its weights (h, d_v).
        b1: its bias (h,), or None.
    """
    dtype = torch.promote_types(at_least_fp32(features).dtype, at_least_fp32(w1).dtype)
    before = features.to(dtype) @ w1.to(dtype).T
    return before if b1 is None else before + b1


def weight_kernel(w1: Tensor, w2: Tensor) -> Tensor:
    """Returns what `op.weight_kernel` describes."""
    w1, w2 = at_least_fp32(w1), at_least_fp32(w2)
    return (w2.T @ w2) * (w1 @ w1.T)


def weight_root(w2: Tensor) -> Tensor:
    """Returns what `op.weight_root` describes."""
    root: Tensor = torch.linalg.qr(at_least_fp32(w2), mode="r").R
    return root


def bands(root: Tensor) -> Iterator[slice]:
    """Yields the rows of a triangular matrix in slices; those from row i
    on are zero before column i.
    """
    # eight parts at most, of 128 rows at least
    size = max(128, -(-len(root) // 8))
    return (slice(start, start + size) for start in range(0, len(root), size))


def monte_carlo(
    features: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    activation: Callable[[Tensor], Tensor],
    root: Tensor,
    bank: Tensor,
    step: float,
) -> Tensor:
    """Returns what `op.monte_carlo` describes, one direction after the other."""
    before, root = pre_activation(features, w1, b1), at_least_fp32(root)
    total = before.new_zeros(features.shape[:-1])
    # the first layer is linear: a step along u moves its output by W1 u
    for shift in pre_activation(bank, w1, None) * step:
        difference = activation(before + shift) - activation(before - shift)
        squares = torch.zeros_like(total)
        for rows in bands(root):
            part = difference[..., rows.start :] @ root[rows, rows.start :].T
            squares += part.square().sum(-1)
        total += squares.sqrt()
    return total / (2 * step * len(bank))


def is_gelu(activation: Callable[[Tensor], Tensor]) -> bool:
    """Returns whether an activation is the exact GELU: torch's function or
    module, or transformers' module.
    """
    if isinstance(activation, nn.GELU):
        return activation.approximate == "none"
    return getattr(activation, "act", activation) is gelu  # transformers keeps it in `.act`


def slopes(before: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """Returns the activation's derivative at pre-activations (...): by automatic differentiation
    unless it is GELU.

    Args:
        before: pre-activations.
        activation: acts elementwise.
    """
    if is_gelu(activation):
        derivative: Tensor = torch.ops.aten.gelu_backward(torch.ones_like(before), before)
        return derivative
    with torch.inference_mode(False), torch.enable_grad():
        point = before.clone().detach().requires_grad_()
        (slope,) = torch.autograd.grad(activation(point).sum(), point)
    return slope


def mean_lengths(slope: Tensor, shifts: Tensor, root: Tensor) -> Tensor:
    """Returns the mean over shifts s of |root (d * s)|, (n,).

    Args:
        slope: d of each token, (n, h).
        shifts: of the first layer along directions, (m, h).
        root: of the second layer, (r, h).
    """
    means = slope.new_empty(len(slope))
    # a tile of tokens is multiplied with all shifts, few enough that the products stay in a cache
    tile = max(1, ROWS // max(1, len(shifts)))
    for start in range(0, len(slope), tile):
        moved = (slope[start : start + tile, None] * shifts).flatten(0, 1)
        squares = moved.new_zeros(len(moved))
        for rows in bands(root):
            squares += (moved[:, rows.start :] @ root[rows, rows.start :].T).square_().sum(1)
        means[start : start + tile] = squares.sqrt_().view(-1, len(shifts)).mean(1)
    return means


def mean_lengths_in_bf16(slope: Tensor, shifts: Tensor, root: Tensor) -> Tensor:
    """Returns what `mean_lengths` does, in fp32, with products in bfloat16.

    Rounding moves a length by some 1e-4 of it, as it is a mean over many numbers.

    Args:
        slope: d of each token, (n, h).
        shifts: of the first layer along directions, (m, h).
        root: of the second layer, (r, h).
    """
    low, small, matrix = slope.bfloat16(), shifts.bfloat16(), root.bfloat16().T
    means = torch.empty(len(slope), device=slope.device)
    # as many tokens at a time as have a million numbers, which stay in a cache
    tile = max(1, 2**20 // max(1, small.numel()))
    for start in range(0, len(slope), tile):
        outputs = (low[start : start + tile, None] * small).flatten(0, 1) @ matrix
        lengths = torch.linalg.vector_norm(outputs, dim=1, dtype=torch.float32)
        means[start : start + tile] = lengths.view(-1, len(shifts)).mean(1)
    return means


def quadratic(rows: Tensor, matrix: Tensor) -> Tensor:
    """Returns x^T A x of each row x of (n, h), for a symmetric A (h, h), at half of the products.

    Args:
        rows: x.
        matrix: A.
    """
    total, twice = rows.new_zeros(len(rows)), 2 * rows
    for part in bands(matrix):
        # what is right of the diagonal block counts for what is below it, too
        right = twice[:, part.stop :] @ matrix[part, part.stop :].T
        total += ((rows[:, part] @ matrix[part, part].T + right) * rows[:, part]).sum(1)
    return total


def directional(
    features: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    activation: Callable[[Tensor], Tensor],
    root: Tensor,
    bank: Tensor,
) -> Tensor:
    """Returns what `op.directional` describes."""
    slope = slopes(pre_activation(features, w1, b1), activation)
    shifts = pre_activation(bank, w1, None).to(slope)
    lengths = mean_lengths(slope.flatten(0, -2), shifts, at_least_fp32(root).to(slope))
    return lengths.view(features.shape[:-1])


def closed_form(
    features: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    activation: Callable[[Tensor], Tensor],
    kernel: Tensor,
) -> Tensor:
    """Returns what `op.closed_form` describes."""
    slope = slopes(pre_activation(features, w1, b1), activation)
    squared = quadratic(slope.flatten(0, -2), at_least_fp32(kernel).to(slope)) / features.shape[-1]
    return squared.clamp_min(0).sqrt().view(features.shape[:-1])
