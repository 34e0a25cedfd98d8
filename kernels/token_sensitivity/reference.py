"""How much a two-layer projector's output moves with each token, in plain PyTorch."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from vlm_prune.kernels.visible import at_least_fp32

PRODUCTS = 2048  # numbers of a token that directions taken together make


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
    """Rows of a triangular matrix in parts; a part starting at row i is zero before column i."""
    size = max(64, -(-len(root) // 8))
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
    for shift in pre_activation(bank, w1, None) * step:
        difference = activation(before + shift) - activation(before - shift)
        squares = torch.zeros_like(total)
        for rows in bands(root):
            part = difference[..., rows.start :] @ root[rows, rows.start :].T
            squares += part.square().sum(-1)
        total += squares.sqrt()
    return total / (2 * step * len(bank))


def slopes(before: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """Returns the activation's derivative at pre-activations (...), by automatic differentiation.

    Args:
        before: pre-activations.
        activation: acts elementwise.
    """
    with torch.inference_mode(False), torch.enable_grad():
        point = before.clone().detach().requires_grad_()
        (slope,) = torch.autograd.grad(activation(point).sum(), point)
    return slope


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
    """Returns what `op.directional` describes."""
    slope = slopes(pre_activation(features, w1, b1), activation)
    total = slope.new_zeros(features.shape[:-1])
    for maps in moved_roots(w1, at_least_fp32(root), bank):
        squares = slope.new_zeros(*total.shape, len(maps))
        for rows in bands(root):
            part = maps[:, rows, rows.start :]
            moved = slope[..., rows.start :] @ part.flatten(0, 1).T.to(slope)
            squares += moved.unflatten(-1, part.shape[:2]).square().sum(-1)
        total += squares.sqrt().sum(-1)
    return total / len(bank)


def closed_form(
    features: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    activation: Callable[[Tensor], Tensor],
    kernel: Tensor,
) -> Tensor:
    """Returns what `op.closed_form` describes."""
    slope = slopes(pre_activation(features, w1, b1), activation)
    squared = ((slope @ at_least_fp32(kernel)) * slope).sum(-1) / features.shape[-1]
    return squared.clamp_min(0).sqrt()
