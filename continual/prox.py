"""Proximal steps that shrink and zero the weights of LoRA's components.

https://arxiv.org/abs/2412.01004
"""

from math import ceil
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Operator = Literal["textbook", "coded"]
LEVELS = 50


def textbook(weights: Tensor, kappa: float | Tensor) -> Tensor:
    """Returns the soft threshold: 0 where |w| <= kappa, otherwise w moved by kappa toward 0.

    `kappa` >= 0 broadcasts to the shape of `weights`.
    """
    if isinstance(kappa, Tensor):
        return weights.sign() * (weights.abs() - kappa).clamp(min=0)
    return F.softshrink(weights, kappa)


def coded(weights: Tensor, kappa: float | Tensor) -> Tensor:
    """Returns the soft threshold as the authors' code applies it, with
    three statements in sequence.

    Weights between kappa and 2 kappa are shrunk by the first two statements and then zeroed by the
    third, so the dead zone is twice as wide as in `textbook`.
    """
    shrunk = weights.where(weights.abs() <= kappa, weights - weights.sign() * kappa)
    return shrunk.where(shrunk.abs() >= kappa, 0.0)


OPERATORS = {"textbook": textbook, "coded": coded}


def dense_steps(steps: int, dense: float) -> int:
    """Returns the number of steps before pruning starts."""
    return int(dense * steps)


def threshold(
    step: int,
    steps: int,
    dense: float,
    kappa: float,
    levels: int = LEVELS,
    ramp: Operator = "textbook",
) -> float:
    """Returns what `step` (from 0) of `steps` shrinks weights by: 0 at
    first, then a ramp up to `kappa`.

    After `dense` of the steps a level counter rises by one every floor(remaining / levels) steps,
    and the threshold is kappa * level / (levels - 1); 500 steps have 249 thresholds that add up to
    0.6499.

    Args:
        step: the step just taken.
        steps: of the task.
        dense: share of the steps before pruning starts.
        kappa: the last threshold.
        levels: of the ramp, its zero included.
        ramp: `textbook` starts after a whole number of steps, and where fewer than `levels` remain
            the counter rises at every step, so that the ramp ends below `kappa`; `coded` is that of
            the authors' code, which starts after `dense` times `steps` even where that is not
            whole, and prunes nothing where fewer than `levels` steps remain.
    """
    start = dense * steps if ramp == "coded" else dense_steps(steps, dense)
    if step <= start:
        return 0.0
    stride = int((steps - start) // levels)
    if stride == 0:
        if ramp == "coded":
            return 0.0
        stride = 1
    # multiples of the stride from the start on, up to this step
    level = step // stride - ceil(start / stride) + 1
    return kappa * min(level, levels - 1) / (levels - 1)


def total_shrinkage(
    steps: int, dense: float, kappa: float, levels: int = LEVELS, ramp: Operator = "textbook"
) -> float:
    """Returns the sum of all thresholds: how far from 0 an untrained weight must start to survive.

    Args:
        steps: of the task.
        dense: share of the steps before the first threshold.
        kappa: the largest threshold.
        levels: of the ramp.
        ramp: how the thresholds rise, as for `threshold`.
    """
    return sum(threshold(step, steps, dense, kappa, levels, ramp) for step in range(steps))
