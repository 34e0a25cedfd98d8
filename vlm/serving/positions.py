"""Where kept tokens stand in their image, written into their rows so that it survives any cache.

vLLM numbers the positions of a prompt before the vision tower has run. A kept row therefore brings
its (time, height, width) in the image as six base-128 digits, which every floating-point type holds
exactly.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

BASE = 128
CHANNELS = 6


def with_grid(rows: Tensor, indices: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Returns rows with the coordinates of their tokens behind them.

    Args:
        rows: (k, d).
        indices: (k,), indices into the image's tokens in reading order.
        grid: time, height and width of the image in tokens.

    Returns:
        (k, d + 6).
    """
    # time, row and column, each as two digits that half precision holds exactly
    _, height, width = grid
    coordinates = torch.stack(
        [indices // (height * width), indices // width % height, indices % width], 1
    )
    digits = torch.stack([coordinates // BASE, coordinates % BASE], 2).flatten(1)
    return torch.cat([rows, digits.to(rows)], 1)


def split_grid(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Splits what `with_grid` joined into rows (k, d) and coordinates (k, 3)."""
    digits = rows[:, -CHANNELS:].long().unflatten(1, (3, 2))
    return rows[:, :-CHANNELS], digits[..., 0] * BASE + digits[..., 1]


def expanded(
    ids: Sequence[int], images: Sequence[tuple[int, int, int]]
) -> tuple[list[int], list[bool]]:
    """Returns the unpruned prompt of a pruned one.

    Args:
        ids: the pruned prompt.
        images: for each image, in their order, its first placeholder, how many it has, and how
            many it had.

    Returns:
        The ids of the unpruned prompt, and which of them stand for those of the pruned one: of an
        image the first ones.
    """
    out: list[int] = []
    kept: list[bool] = []
    end = 0
    for start, count, whole in images:
        # text and kept placeholders, then as many as were dropped
        out += [*ids[end : start + count], *[ids[start]] * (whole - count)]
        kept += [True] * (start + count - end) + [False] * (whole - count)
        end = start + count
    out += ids[end:]
    kept += [True] * (len(ids) - end)
    return out, kept
