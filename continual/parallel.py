"""Several processes that compute one and the same step.

Each process sees its share of the images. Features are gathered, so that the losses, which couple
the images of a batch, are those of the whole batch on every process; gradients are averaged in one
flat reduction. Nothing is wrapped, since what is trained changes with every task.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Gather(torch.autograd.Function):
    """Join rows of all processes; the gradient of a row is the sum of all processes' gradients."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def rank_and_world() -> tuple[int, int]:
    """Returns this process's number, and how many there are."""
    together = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if together else (0, 1)


def total(counts: Tensor) -> Tensor:
    """Returns the sum of a tensor over all processes."""
    if rank_and_world()[1] > 1:
        counts = counts.clone()
        dist.all_reduce(counts)
    return counts


def gather(rows: Tensor) -> Tensor:
    """Returns rows (m, ...) of all w processes, (w m, ...),
    differentiable; all must have m rows.
    """
    if rank_and_world()[1] == 1:
        return rows
    joined: Tensor = _Gather.apply(rows)
    return joined


@torch.no_grad()
def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replaces every gradient by its mean over the processes, in place."""
    if rank_and_world()[1] == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= rank_and_world()[1]
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
