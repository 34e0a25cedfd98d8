"""Control: a smaller image."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from vlm_prune.pruning.base import Stage, VisionPruner
from vlm_prune.vlm.budget import tokens_for
from vlm_prune.vlm.encoded import Images
from vlm_prune.vlm.families import Family, Need
from vlm_prune.vlm.prompt_pruning import BeforeModel
from vlm_prune.vlm.tokens import Kept, VisionTokens


def grid_for(k: int, rows: int, columns: int, stretch: float = 1.5) -> tuple[int, int]:
    """Returns the largest grid of at most `k` cells whose shape is within `stretch` of rows x columns.

    Where no grid is, because a long image has few cells, it is the one of nearest shape.

    Args:
        k: cells at most.
        rows: of the full grid.
        columns: of the full grid.
        stretch: how many times longer or shorter than the full grid's a side may be for the other.
    """
    grids = [(r, c) for r in range(1, rows + 1) for c in range(1, columns + 1) if r * c <= k]

    def stretched(r: int, c: int) -> float:
        one, other = r * columns, c * rows
        return max(one, other) / min(one, other)

    near = [(r * c, -stretched(r, c), r, c) for r, c in grids if stretched(r, c) <= stretch]
    if near:
        return max(near)[2:]
    return min(grids, key=lambda grid: stretched(*grid))


@dataclass
class Downsample(VisionPruner):
    """Shrink the image until the tower itself emits no more tokens than the budget.

    Sides are whole patches, so a budget such as 128 gives 121 tokens (11 x 11); the count really
    used is reported. Position embeddings are interpolated.
    """

    stage: ClassVar[Stage] = "input"

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"a fixed image size", "a tower that takes smaller images"})

    def before_model(self, family: Family, vision: Images | None) -> BeforeModel:
        patch, full = family.patch_size, [(1, 1)]

        def shrink(pixel_values: Tensor) -> Tensor:
            full[0] = pixel_values.shape[-2] // patch, pixel_values.shape[-1] // patch
            return self.shrunk(pixel_values, patch)

        def reduce(vision: VisionTokens) -> Kept:
            return self.within(vision, full[0])

        return BeforeModel(reduce, self.positions_on(family), shrink, vision)

    def shrunk_grid(self, rows: int, columns: int) -> tuple[int, int]:
        """Returns the rows and columns of patches that are left of an image."""
        return grid_for(tokens_for(self.budget, rows * columns), rows, columns)

    def shrunk(self, pixel_values: Tensor, patch: int) -> Tensor:
        """Returns images (M, 3, H, W) of fewer patches, each of `patch` x `patch` pixels."""
        rows, columns = (side // patch for side in pixel_values.shape[-2:])
        small = self.shrunk_grid(rows, columns)
        if small == (rows, columns):
            return pixel_values
        size = [side * patch for side in small]
        # torch shrinks no bfloat16 with antialiasing on a CPU
        shrunk = interpolate(pixel_values.float(), size, mode="bicubic", antialias=True)
        return shrunk.to(pixel_values.dtype)

    def within(self, vision: VisionTokens, full: tuple[int, int]) -> Kept:
        """Returns all tokens of the small image, each at its middle in the `full` grid."""
        (rows, columns), (full_rows, full_columns) = vision.grid, full
        down = torch.arange(rows) * full_rows // rows + full_rows // rows // 2
        across = torch.arange(columns) * full_columns // columns + full_columns // columns // 2
        indices = (down[:, None] * full_columns + across).flatten().to(vision.projected.device)
        return Kept([indices] * len(vision.projected), list(vision.projected))

    def reduce(self, vision: VisionTokens) -> Kept:
        """Returns the tokens as they are: they are those of an image that was not shrunk."""
        return self.within(vision, vision.grid)
