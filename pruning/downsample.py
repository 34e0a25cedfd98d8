"""Control: a smaller image."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from vlm_prune.pruning.base import Stage, VisionPruner
from vlm_prune.vlm.budget import tokens_for
from vlm_prune.vlm.families import Need
from vlm_prune.vlm.tokens import Kept, VisionTokens


def grid_for(k: int, rows: int, columns: int, stretch: float = 1.5) -> tuple[int, int]:
    """The largest grid of at most `k` cells whose shape is within `stretch` of rows x columns."""
    fits = [
        (r * c, -abs(r * columns - c * rows), r, c)
        for r in range(1, rows + 1)
        for c in range(1, columns + 1)
        if r * c <= k and max(r * columns, c * rows) <= stretch * min(r * columns, c * rows)
    ]
    return max(fits)[2:]


@dataclass
class Downsample(VisionPruner):
    """Shrink the image until the tower itself emits no more tokens than the budget.

    Sides are whole patches, so a budget such as 128 gives 121 tokens (11 x 11); the count really
    used is reported. Position embeddings are interpolated.
    """

    patch: int = 14
    stage: ClassVar[Stage] = "input"

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"a fixed image size"})

    def pixels(self, pixel_values: Tensor) -> Tensor:
        rows, columns = (side // self.patch for side in pixel_values.shape[-2:])
        small = grid_for(tokens_for(self.budget, rows * columns), rows, columns)
        self._full = (rows, columns)
        size = [side * self.patch for side in small]
        if size == list(pixel_values.shape[-2:]):
            return pixel_values
        return interpolate(pixel_values, size, mode="bicubic", antialias=True)

    def reduce(self, vision: VisionTokens) -> Kept:
        (rows, columns), (full_rows, full_columns) = vision.grid, self._full
        down = torch.arange(rows) * full_rows // rows + full_rows // rows // 2
        across = torch.arange(columns) * full_columns // columns + full_columns // columns // 2
        places = (down[:, None] * full_columns + across).flatten().to(vision.projected.device)
        return Kept([places] * len(vision.projected), list(vision.projected))
