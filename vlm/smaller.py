"""Images and videos of fewer tokens than a processor made: their pixels, and what each token stands for."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

GridOf = Callable[[int, int, int, int], tuple[int, int]]
"""From the rows and columns of tokens of an image or a frame, the frames of its video, 0 for an image, and
all placeholders to the rows and columns that are left."""


@dataclass(frozen=True)
class Smaller:
    """Images or videos that were shrunk before the tower sees them.

    Args:
        pixel_values: as the processor would give them.
        inputs: arguments next to them that are others now.
        places: where the tokens of each stand among those of the whole one, (n_i,).
        counts: placeholders of each whole one.
    """

    pixel_values: Tensor
    inputs: dict[str, Any]
    places: list[Tensor]
    counts: list[int]


def resized(views: Tensor, height: int, width: int) -> Tensor:
    """Returns views of another size.

    Args:
        views: (V, C, H, W).
        height: that they get, in pixels.
        width: that they get, in pixels.
    """
    # torch shrinks no bfloat16 with antialiasing on a CPU
    changed = interpolate(views.float(), [height, width], mode="bicubic", antialias=True)
    return changed.to(views.dtype)


def places_of(small: tuple[int, int], whole: tuple[int, int], frames: int = 1) -> Tensor:
    """Returns the tokens of a whole grid in the middle of what each token of a smaller one shows, (n,).

    Args:
        small: rows and columns of the smaller grid.
        whole: rows and columns of the whole one.
        frames: that have such grids, one after the other.
    """
    (rows, columns), (all_rows, all_columns) = small, whole
    down = torch.arange(rows) * all_rows // rows + all_rows // rows // 2
    across = torch.arange(columns) * all_columns // columns + all_columns // columns // 2
    each = (down[:, None] * all_columns + across).flatten()
    starts = torch.arange(frames) * all_rows * all_columns
    return (starts[:, None] + each).flatten()
