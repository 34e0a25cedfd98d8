"""Control: a smaller image, or a video of smaller frames."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlm_prune.pruning.base import Stage, VisionPruner
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.encoded import Images
from vlm_prune.vlm.families import Family, Need
from vlm_prune.vlm.prompt_pruning import BeforeModel
from vlm_prune.vlm.smaller import places_of, resized
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
    used is reported. Position embeddings are interpolated. All frames of a video are shrunk alike, and
    none is left out. Images of LLaVA-OneVision, whose tiles the processor decides on, stay whole.
    """

    stage: ClassVar[Stage] = "input"

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"a tower that takes smaller images"})

    def before_model(self, family: Family, vision: Images | None) -> BeforeModel:
        if vision is not None:
            raise InputError(
                "downsample shrinks what is not encoded yet; give the model pixels, not what was encoded"
            )
        return BeforeModel(_as_it_is, self.positions_on(family), self.smaller_grid)

    def smaller_grid(self, rows: int, columns: int, frames: int, available: int) -> tuple[int, int]:
        """Returns the rows and columns of tokens that are left of an image or of each frame.

        Args:
            rows: of its tokens.
            columns: of its tokens.
            frames: of the video, 0 for an image.
            available: placeholders of the image or video.

        Raises:
            InputError: if frames would have less than a token.
        """
        parts = max(1, frames)
        count = self.count_of(parts * rows * columns, available, frames)
        if count < parts:
            raise InputError(
                f"budget {self.budget} is below one token for each of the {frames} frames of a video, "
                "and downsample leaves none out; give 1/frame or more"
            )
        return grid_for(count // parts, rows, columns)

    def shrunk_grid(self, rows: int, columns: int) -> tuple[int, int]:
        """Returns the rows and columns of patches that are left of an image."""
        return self.smaller_grid(rows, columns, 0, rows * columns)

    def shrunk(self, pixel_values: Tensor, patch: int) -> Tensor:
        """Returns images (M, 3, H, W) of fewer patches, each of `patch` x `patch` pixels."""
        rows, columns = (side // patch for side in pixel_values.shape[-2:])
        small = self.shrunk_grid(rows, columns)
        if small == (rows, columns):
            return pixel_values
        return resized(pixel_values, small[0] * patch, small[1] * patch)

    def reduce(self, vision: VisionTokens) -> Kept:
        """Returns the tokens of whole images in the middle of what those of smaller ones show."""
        return self._in_the_middle(vision, 1)

    def reduce_video(self, vision: VisionTokens) -> Kept:
        """Returns the tokens of whole videos in the middle of what those of smaller ones show."""
        return self._in_the_middle(vision, vision.frames)

    def _in_the_middle(self, vision: VisionTokens, parts: int) -> Kept:
        whole = vision.grids[0]
        small = self.smaller_grid(*whole, vision.frames, vision.available)
        places = places_of(small, whole, parts).to(vision.projected.device)
        return Kept.at(vision.projected, places.expand(len(vision.projected), -1))


def _as_it_is(vision: VisionTokens) -> Kept:
    """Returns all tokens."""
    count = vision.projected.shape[1]
    every = torch.arange(count, device=vision.projected.device)
    return Kept([every] * len(vision.projected), list(vision.projected))
