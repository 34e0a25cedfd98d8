"""Opening images that strangers made."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageFile, UnidentifiedImageError

from vlm_prune.vlm.common.errors import InputError

MAX_PIXELS = 89_000_000


def open_image(source: str | Path | BinaryIO | Image.Image) -> Image.Image:
    """An RGB image from a path, an open file or a Pillow image; other modes are converted, transparency on white.

    Raises:
        InputError: if the file is missing, unreadable or truncated, the image is empty, or it has
            more than 89 million pixels (a decompression bomb).
    """
    try:
        with warnings.catch_warnings(), _whole_images():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = source if isinstance(source, Image.Image) else Image.open(source)
            if min(image.size) < 1:
                raise InputError(f"the image {_name(source)}is empty")
            if image.width * image.height > MAX_PIXELS:
                raise InputError(_bomb(source))
            image.load()
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise InputError(_bomb(source)) from None
    except UnidentifiedImageError:
        raise InputError(f"{_name(source) or 'it '}is no image that Pillow can read") from None
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        shown = f"image {_name(source)}".rstrip()
        raise InputError(f"cannot read {shown}: {error}") from error
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


@contextmanager
def _whole_images() -> Iterator[None]:
    """Refuse truncated images, even where a package (lmms-eval) told Pillow to fill them up."""
    lenient = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = lenient


def _name(source: object) -> str:
    """A file's name with a space behind it; nothing where there is none."""
    return f"{source} " if isinstance(source, str | Path) else ""


def _bomb(source: object) -> str:
    return f"the image {_name(source)}has more than {MAX_PIXELS // 10**6} million pixels; shrink it"
