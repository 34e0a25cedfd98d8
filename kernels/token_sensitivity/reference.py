"""How much a two-layer projector's output moves with each token, in plain PyTorch."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from vlm_prune.kernels.visible import at_least_fp32


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


def closed_form(
    features: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    activation: Callable[[Tensor], Tensor],
    kernel: Tensor,
) -> Tensor:
    """Returns what `op.closed_form` describes, the derivative by automatic differentiation."""
    before = pre_activation(features, w1, b1)
    with torch.inference_mode(False), torch.enable_grad():
        point = before.clone().detach().requires_grad_()
        (slope,) = torch.autograd.grad(activation(point).sum(), point)
    squared = ((slope @ at_least_fp32(kernel)) * slope).sum(-1) / features.shape[-1]
    return squared.clamp_min(0).sqrt()
