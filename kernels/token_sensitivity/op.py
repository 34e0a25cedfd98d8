"""Sensitivity of a projector's output W2 act(W1 x + b1) to its tokens, dispatched.

Triton knows GELU, which the LLaVA projectors have; other activations run the reference.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from vlm_prune.kernels.dispatch import implementation
from vlm_prune.kernels.token_sensitivity import reference
from vlm_prune.kernels.token_sensitivity.reference import is_gelu

__all__ = ["closed_form", "directional", "monte_carlo", "weight_kernel", "weight_root"]

Activation = Callable[[Tensor], Tensor]


def monte_carlo(
    features: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    activation: Activation,
    root: Tensor,
    bank: Tensor,
    step: float,
) -> Tensor:
    """Returns the mean over directions u of |M(x + hu) - M(x - hu)| / 2h, ZOO-Prune's estimate.

    https://arxiv.org/abs/2509.24837

    Shapes: features (..., d_v), w1 (h, d_v), b1 (h,), root (r, h), bank (m, d_v) -> (...), in at
    least fp32. The first layer runs once on tokens and once on directions, the difference is
    taken behind it, and the second layer's bias cancels: the same in exact arithmetic, without
    the rounding of x + hu. On a GPU matrix products run in the dtype of the weights.

    Args:
        features: tokens x as the projector reads them.
        w1: weights of the first layer.
        b1: its bias, or None.
        activation: acts elementwise.
        root: the second layer's `weight_root`.
        bank: directions u, one per row.
        step: h.
    """
    module = _implementation(features, activation)
    sensitivity: Tensor = module.monte_carlo(features, w1, b1, activation, root, bank, step)
    return sensitivity


def directional(
    features: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    activation: Activation,
    root: Tensor,
    bank: Tensor,
) -> Tensor:
    """Returns the mean over directions u of |J u|, J the derivative of the projector at a token: what
    `monte_carlo` tends to for small steps.

    Shapes: features (..., d_v), w1 (h, d_v), b1 (h,), root (r, h), bank (m, d_v) -> (...), in at
    least fp32. J u is root (d * W1 u) with d the activation's derivative, so all directions are one
    matrix product of d, and the activation is evaluated once. On a GPU products run in the dtype of
    the weights.

    Args:
        features: tokens as the projector reads them.
        w1: weights of the first layer.
        b1: its bias, or None.
        activation: acts elementwise.
        root: the second layer's `weight_root`.
        bank: directions u, one per row.
    """
    module = _implementation(features, activation)
    sensitivity: Tensor = module.directional(features, w1, b1, activation, root, bank)
    return sensitivity


def weight_root(w2: Tensor) -> Tensor:
    """Returns R of W2 = Q R, upper triangular: |R x| = |W2 x|, at about half the products.

    Shapes: w2 (d_l, h) -> (min(d_l, h), h), once per projector. In at least fp32, on a GPU in the
    dtype of the weights.
    """
    root: Tensor = implementation("token_sensitivity", w2).weight_root(w2)
    return root


def weight_kernel(w1: Tensor, w2: Tensor) -> Tensor:
    """Returns K = (W2^T W2) * (W1 W1^T), (h, h); one per projector serves all images.

    Shapes: w1 (h, d_v), w2 (d_l, h). In at least fp32, on a GPU in bf16 where the weights are in
    half precision.
    """
    kernel: Tensor = implementation("token_sensitivity", w2).weight_kernel(w1, w2)
    return kernel


def closed_form(
    features: Tensor, w1: Tensor, b1: Tensor | None, activation: Activation, kernel: Tensor
) -> Tensor:
    """Returns sqrt(d^T K d / d_v), the root mean square over directions in the limit of small steps.

    d is the activation's derivative at W1 x + b1. Ours, after https://arxiv.org/abs/2509.24837.

    Shapes: features (..., d_v), w1 (h, d_v), b1 (h,), kernel (h, h) -> (...), in at least fp32.

    Args:
        features: tokens x as the projector reads them.
        w1: weights of the first layer.
        b1: its bias, or None.
        activation: acts elementwise.
        kernel: K, the projector's `weight_kernel`.
    """
    module = _implementation(features, activation)
    sensitivity: Tensor = module.closed_form(features, w1, b1, activation, kernel)
    return sensitivity


def _implementation(features: Tensor, activation: Activation) -> Any:
    return implementation("token_sensitivity", features) if is_gelu(activation) else reference
