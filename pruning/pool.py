"""Control: average pooling."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlm_prune.pruning.base import Stage, VisionPruner
from vlm_prune.vlm.budget import even_shares
from vlm_prune.vlm.tokens import Kept, VisionTokens


def rectangles(k: int, rows: int, columns: int) -> list[tuple[slice, slice]]:
    """Returns `k` rectangles of nearly equal size that make up a grid, in reading order.

    About sqrt(k) bands of rows, each cut into its share of columns.

    Args:
        k: rectangles, at most rows x columns.
        rows: of the grid.
        columns: of the grid.
    """
    # bands of rows so that rectangles are about square, and no band has more than its columns
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
    share the budget by their numbers of tokens. Of a video, averages are over boxes: about as many
    frames as tokens along a side, at the frame and token in the box's middle.
    """

    stage: ClassVar[Stage] = "projector"

    def reduce(self, vision: VisionTokens) -> Kept:
        k, tokens, start = self.count(vision), vision.projected.shape[1], 0
        means, middles = [], []
        for rows, columns in vision.grids:
            end = start + rows * columns
            grid = vision.projected[:, start:end].unflatten(1, (rows, columns))
            # views share the budget by their tokens
            share = k * end // tokens - k * start // tokens
            for r, c in rectangles(share, rows, columns) if share else []:
                means.append(grid[:, r, c].mean(dim=(1, 2)))
                middles.append(start + middle(r, c, columns))
            start = end
        indices = torch.tensor(middles, device=vision.projected.device)
        order = indices.argsort()
        return Kept([indices[order]] * len(vision.projected), list(torch.stack(means, 1)[:, order]))

    def reduce_video(self, vision: VisionTokens) -> Kept:
        k, frames = self.count(vision), vision.frames
        rows, columns = vision.grids[0]
        size = rows * columns
        # as many frames are averaged as patches on a side, where that leaves tokens for all
        together = max(1, round((frames * size / k) ** (1 / 3)))
        groups = min(k, max(-(-frames // together), -(-k // size)))
        grid = vision.projected.unflatten(1, (frames, rows, columns))
        means, middles = [], []
        for group, share in enumerate(even_shares(k, groups)):
            first, end = group * frames // groups, (group + 1) * frames // groups
            frame = (first + end - 1) // 2
            for r, c in rectangles(share, rows, columns):
                means.append(grid[:, first:end, r, c].mean(dim=(1, 2, 3)))
                middles.append(frame * size + middle(r, c, columns))
        indices = torch.tensor(middles, device=vision.projected.device)
        order = indices.argsort()
        return Kept([indices[order]] * len(vision.projected), list(torch.stack(means, 1)[:, order]))


def middle(rows: slice, columns: slice, across: int) -> int:
    """Returns the index of a rectangle's middle token in its grid.

    Args:
        rows: of the rectangle.
        columns: of the rectangle.
        across: columns of the grid.
    """
    row, column = (rows.start + rows.stop - 1) // 2, (columns.start + columns.stop - 1) // 2
    return int(row * across + column)
