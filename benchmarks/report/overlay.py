"""Which tokens a method keeps, drawn on the picture."""

from math import ceil, sqrt

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from vlm_prune.vlm.common.video import VideoClip

SMALL = 224
"""Pixels of the longer side of a frame on a contact sheet."""
CAPTION = 20


def kept_overlay(image: Image.Image, indices: Tensor, grid: tuple[int, int]) -> Image.Image:
    """Returns the RGB image with everything pale but the patches of the tokens kept.

    Args:
        image: the picture.
        indices: of the tokens, (k,), in a grid that covers the whole image, in reading order.
        grid: its rows and columns.
    """
    rows, columns = grid
    kept = np.zeros(rows * columns, bool)
    kept[indices.cpu().numpy()] = True
    pixels = np.asarray(image)
    height, width = pixels.shape[:2]
    down, across = np.arange(height) * rows // height, np.arange(width) * columns // width
    shown = kept.reshape(grid)[down[:, None], across, None]
    return Image.fromarray(np.where(shown, pixels, pixels // 5 + 190).astype(np.uint8))


def spaced(shown: int, frames: int) -> list[int]:
    """Returns which of `shown` frames of a clip stand for the `frames` that a model makes of them:
    the first one of those that are encoded together.
    """
    together = ceil(shown / frames)
    # of the last ones that are encoded together there may be fewer
    return [min(frame * together, shown - 1) for frame in range(frames)]


def contact_sheet(clip: VideoClip, indices: Tensor, grid: tuple[int, int, int]) -> Image.Image:
    """Returns the frames of a video side by side, each with its time, the number of its tokens that
    are kept, and everything pale but their patches.

    Where a model encodes several frames as one, the first one of them is shown.

    Args:
        clip: the frames.
        indices: tokens kept (k,) among the video's, frame by frame; others are none of a frame.
        grid: frames, rows and columns of the tokens.
    """
    frames, rows, columns = grid
    size = rows * columns
    kept = indices[indices < frames * size].cpu()
    tiles = []
    for frame, shown in enumerate(spaced(len(clip.frames), frames)):
        chosen = kept[kept // size == frame] % size
        picture = kept_overlay(_small(clip, shown), chosen, (rows, columns))
        tiles.append(_captioned(picture, f"{clip.times[shown]:.1f} s: {len(chosen)} of {size}"))
    return _side_by_side(tiles)


def frame_sheet(clip: VideoClip) -> Image.Image:
    """Returns the frames of a video side by side, each with its time."""
    return _side_by_side(
        [
            _captioned(_small(clip, number), f"{seconds:.1f} s")
            for number, seconds in enumerate(clip.times)
        ]
    )


def _small(clip: VideoClip, number: int) -> Image.Image:
    return ImageOps.contain(Image.fromarray(clip.frames[number]), (SMALL, SMALL))


def _captioned(picture: Image.Image, text: str) -> Image.Image:
    tile = Image.new("RGB", (picture.width, picture.height + CAPTION), "white")
    tile.paste(picture, (0, CAPTION))
    ImageDraw.Draw(tile).text((2, 2), text, "black", ImageFont.load_default(12))
    return tile


def _side_by_side(tiles: list[Image.Image]) -> Image.Image:
    """Returns pictures of one size as one that is about as wide as high."""
    width, height = tiles[0].size
    across = ceil(sqrt(len(tiles) * height / width))
    sheet = Image.new("RGB", (across * width, ceil(len(tiles) / across) * height), "white")
    for number, tile in enumerate(tiles):
        sheet.paste(tile, (number % across * width, number // across * height))
    return sheet
