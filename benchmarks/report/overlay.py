"""Which tokens a method keeps, drawn on the picture."""

import numpy as np
from PIL import Image
from torch import Tensor


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
