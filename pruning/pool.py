"""Control: average pooling."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlm_prune.pruning.base import Stage, VisionPruner
from vlm_prune.vlm.tokens import Kept, VisionTokens


def rectangles(k: int, rows: int, columns: int) -> list[tuple[slice, slice]]:
    """Returns `k` rectangles of nearly equal size that make up a grid, in reading order.

    About sqrt(k) bands of rows, each cut into its share of columns.

    Args:
        k: rectangles, at most rows x columns.
        rows: of the grid.
        columns: of the grid.
    """
    bands = min(rows, k, max(1, round((k * rows / columns) ** 0.5), -(-k // columns)))
    out = []
    for band in range(bands):
        share = k * (band + 1) // bands - k * band // bands
        down = slice(rows * band // bands, rows * (band + 1) // bands)
        out += [
            (down, slice(columns * i // share, columns * (i + 1) // share)) for i in range(share)
        ]
    return out


@dataclass
class Pool(VisionPruner):
    """Average the projected tokens of rectangles, exactly as many as the budget.

    Each average stands at the token index of its rectangle's middle token. Several views of an image
    share the budget by their numbers of tokens.
    """

    stage: ClassVar[Stage] = "projector"

    def reduce(self, vision: VisionTokens) -> Kept:
        k, tokens, start = self.count(vision), vision.projected.shape[1], 0
        means, middles = [], []
        for rows, columns in vision.grids:
            end = start + rows * columns
            grid = vision.projected[:, start:end].unflatten(1, (rows, columns))
            share = k * end // tokens - k * start // tokens
            for r, c in rectangles(share, rows, columns) if share else []:
                means.append(grid[:, r, c].mean(dim=(1, 2)))
                row, column = (r.start + r.stop - 1) // 2, (c.start + c.stop - 1) // 2
                middles.append(start + row * columns + column)
            start = end
        indices = torch.tensor(middles, device=vision.projected.device)
        order = indices.argsort()
        return Kept([indices[order]] * len(vision.projected), list(torch.stack(means, 1)[:, order]))
