"""A start for the vision tower that a CPU can afford to train from.

A random patch embedding answers almost only to the mean colour of a patch, and random position
embeddings hide which patches are neighbours. Whitened principal components and two-dimensional
waves give both away from the first step.
"""

from typing import Any

import torch
from torch import Tensor

PATCH_SCALE = 0.5
POSITION_SCALE = 0.4


@torch.no_grad()
def initialise_embeddings(tower: Any, patches: Tensor, generator: torch.Generator) -> None:
    """Set the tower's patch and position embeddings in place.

    Args:
        tower: a CLIP vision transformer of a square grid.
        patches: `(samples, 3 p p)` normalised patches, mostly of objects; more than `width` of them.
        generator: draws the rotation that spreads the components over all channels.
    """
    embeddings = tower.embeddings
    kernel = embeddings.patch_embedding.weight
    kernel.copy_((PATCH_SCALE * whitened(patches, len(kernel), generator)).reshape(kernel.shape))
    table = embeddings.position_embedding.weight
    grid = round((len(table) - 1) ** 0.5)
    table[1:] = POSITION_SCALE * waves(table.shape[1], grid)


def whitened(patches: Tensor, width: int, generator: torch.Generator) -> Tensor:
    """`(width, 3 p p)` filters whose responses to `patches` are uncorrelated and of equal size."""
    centred = patches - patches.mean(0)
    _, singular, components = torch.linalg.svd(centred, full_matrices=False)
    spread = singular[:width, None] / len(patches) ** 0.5
    floor = 0.1 * spread[min(20, width - 1)]
    rotation = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    filters: Tensor = rotation @ (components[:width] / (spread + floor))
    return filters


def waves(width: int, grid: int) -> Tensor:
    """Sines and cosines of the row and of the column of each patch, `(grid * grid, width)`."""
    frequencies = torch.logspace(0.3, -1.1, width // 4)
    angles = torch.arange(grid)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], 1)
    rows, columns = line[:, None].expand(-1, grid, -1), line[None].expand(grid, -1, -1)
    return torch.cat([rows, columns], -1).reshape(grid * grid, width)
