"""Opening images that strangers made: one function for everything that reads pictures."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from vlm_prune.vlm.common.errors import InputError, first_line

MAX_PIXELS = 89_000_000
ImageSource = str | Path | BinaryIO | Image.Image | NDArray[Any]
# Files whose integer samples reach up to 65,535, in whichever of its modes Pillow opens them
SIXTEEN_BIT_FORMATS = ("JPEG2000", "PNG", "PPM")
TIFF_BITS, TIFF_PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0


def open_image(source: ImageSource) -> Image.Image:
    """Opens an image and returns it as people see it: RGB with 8 bits per channel, upright.

    - It is turned as its EXIF orientation says.
    - Transparency is put on white.
    - 16-bit samples are divided by 257, so that 65,535 is white. Floating-point samples from 0 to 1
      are multiplied by 255, those from 0 to 255 are rounded; other ranges are refused.
    - CMYK, palettes, 1-bit and other modes become RGB as Pillow converts them, without profiles.
    - Of an animation it is the first frame, of a Pillow image the current one.

    Args:
        source: a path, an open file, a Pillow image, or an array (height, width) or (height, width,
            3 or 4) of uint8.

    Raises:
        InputError: if the file is missing, unreadable or truncated, the image is empty, its values
            have no meaning as an image, or it has more than 89 million pixels (a decompression
            bomb).
    """
    if isinstance(source, str | Path) and Path(source).exists() and not Path(source).is_file():
        raise InputError(f"{source} is no regular file; give an image file")
    if not (isinstance(source, str | Path | Image.Image | np.ndarray) or hasattr(source, "read")):
        kind = type(source).__name__
        raise InputError(f"an image is a file, a Pillow image or an array, and not a {kind}")
    try:
        with warnings.catch_warnings(), _whole_images():
            warnings.simplefilter("ignore", UserWarning)  # about metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = _opened(source)
            if min(image.size) < 1:
                raise InputError(f"the image {_name(source)}is empty")
            if image.width * image.height > MAX_PIXELS:
                raise InputError(_too_many_pixels(source))
            image.load()
            return _as_rgb(_upright(image))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise InputError(_too_many_pixels(source)) from None
    except UnidentifiedImageError:
        raise InputError(f"{_name(source) or 'it '}is no image that Pillow can read") from None
    except InputError:
        raise
    except Exception as error:  # decoders of broken files raise almost anything
        shown = f"image {_name(source)}".rstrip()
        raise InputError(f"cannot read {shown}: {first_line(error)}") from error


def _opened(source: ImageSource) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if not isinstance(source, np.ndarray):
        return Image.open(source)
    colors = source.ndim == 3 and source.shape[2] in (3, 4)
    if source.dtype != np.uint8 or not (colors or source.ndim == 2):
        raise InputError(
            f"an array {tuple(source.shape)} of {source.dtype} is no image; give (height, width, 3) of uint8"
        )
    return Image.fromarray(source)


def _upright(image: Image.Image) -> Image.Image:
    """Returns the image turned as its EXIF says; what cannot be read there is ignored."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # noqa: BLE001 - a broken note about a picture does not break the picture
        return image
    return ImageOps.exif_transpose(image) if orientation in range(2, 9) else image


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        gray = _eight_bits(image)
        clear = image.info.get("transparency")
        if isinstance(clear, int):
            gray[np.asarray(image) == clear] = 255
        return Image.fromarray(gray).convert("RGB")
    if image.mode not in ("RGBA", "LA", "PA", "RGBa", "La") and "transparency" not in image.info:
        return image.convert("RGB")
    layer = image.convert("LA") if image.mode == "La" else image
    layer = layer.convert("RGBA")
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(layer, mask=layer.getchannel("A"))
    return canvas


def _eight_bits(image: Image.Image) -> NDArray[np.uint8]:
    """Returns samples of 16 or 32 bits, or in floating point, (H, W),
    as 8 bits from black to white.

    Raises:
        InputError: if their range is none of those that pictures have.
    """
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    tags = getattr(image, "tag_v2", {})
    bits = (tags.get(TIFF_BITS) or (16,))[0]
    if not (low >= 0 and np.isfinite(high)):
        most = 0  # NaN compares false
    elif image.mode == "F":
        most = 1 if high <= 1 else 255 if high <= 255 else 0
    elif image.mode != "I" or image.format in SIXTEEN_BIT_FORMATS:
        most = 2 ** min(bits, 16) - 1
    else:
        most = 255 if high <= 255 else 65535 if high <= 65535 else 0
    if not most:
        raise InputError(
            f"the image has values from {low:g} to {high:g}; scale them to 0 to 1, 0 to 255 or 0 to 65535"
        )
    if tags.get(TIFF_PHOTOMETRIC) == WHITE_IS_ZERO:
        values = most - values
    if image.mode == "F":
        return np.rint(values * (255 / most)).astype(np.uint8)
    return ((values.astype(np.uint32) * 255 + most // 2) // most).astype(np.uint8)


@contextmanager
def _whole_images() -> Iterator[None]:
    """Refuses truncated images, even where a package (lmms-eval) told Pillow to fill them up."""
    lenient = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = lenient


def _name(source: object) -> str:
    """Returns a file's name with a space behind it, for messages; nothing for an open image."""
    return f"{source} " if isinstance(source, str | Path) else ""


def _too_many_pixels(source: object) -> str:
    return f"the image {_name(source)}has more than {MAX_PIXELS // 10**6} million pixels; shrink it"
