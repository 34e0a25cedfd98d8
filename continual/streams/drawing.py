"""Pictures of the embedded streams: drawn from a seed, or cut from what PyPI packages bring along.

Fonts are matplotlib's, photographs scikit-image's and scikit-learn's, handwritten digits
scikit-learn's. Every function takes the class, a generator and a `Style` and returns a
`SIDE` x `SIDE` RGB picture; the same generator state gives the same picture.
"""

from collections.abc import Callable
from functools import cache, lru_cache
from importlib.resources import files
from io import BytesIO
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from vlm_prune.continual.streams.patterns import SIDE, SUPERSAMPLE, TEXTURES, Tone, shape_mask
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.package_data import photograph

_photograph = cache(photograph)

Style = Literal["plain", "varied"]
Draw = Callable[[str, np.random.Generator, Style], Image.Image]

COLORS = {
    "red": (214, 32, 32),
    "green": (28, 150, 44),
    "blue": (36, 70, 220),
    "yellow": (240, 220, 30),
    "purple": (128, 30, 160),
    "orange": (245, 135, 20),
    "pink": (250, 150, 190),
    "brown": (115, 70, 30),
    "grey": (128, 128, 128),
    "cyan": (20, 205, 215),
}
SYMBOLS = {
    "integral": "∫",
    "summation": "∑",
    "product": "∏",
    "infinity": "∞",
    "square root": "√",
    "plus-minus": "±",
    "not equal": "≠",
    "approximately equal": "≈",
    "subset": "⊂",
    "element of": "∈",
    "partial derivative": "∂",
    "nabla": "∇",
}
FACES: dict[Style, tuple[str, ...]] = {
    "plain": ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono"),
    "varied": (
        "DejaVuSerif", "DejaVuSerif-BoldItalic", "DejaVuSans-Oblique",
        "STIXGeneral", "STIXGeneralItalic", "STIXGeneralBolIta",
        "cmr10", "cmti10", "cmtt10", "cmb10", "cmss10",
    ),
}  # fmt: skip
SYMBOL_FACES: dict[Style, tuple[str, ...]] = {
    "plain": ("DejaVuSans", "DejaVuSans-Bold"),
    "varied": ("DejaVuSerif", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol"),
}


def shape(name: str, rng: np.random.Generator, style: Style) -> Image.Image:
    """Returns a filled shape, upright; varied ones are turned, and half of them are outlines.

    Args:
        name: of the shape.
        rng: draws place, size and colors.
        style: plain or varied.
    """
    outline = style == "varied" and rng.random() < 0.5
    turn = float(rng.uniform(-180, 180)) if style == "varied" else 0.0
    mask = shape_mask(name, round(SIDE * SUPERSAMPLE * rng.uniform(0.45, 0.75)), outline)
    return on_paper(mask.rotate(turn, Image.Resampling.BILINEAR), rng, style)


def scene(name: str, rng: np.random.Generator, style: Style) -> Image.Image:
    """Returns a shape in a color, such as `red circle`, filled and upright.

    Args:
        name: color and shape.
        rng: draws place, size and tone.
        style: plain or varied.
    """
    color, kind = name.split(" ")
    mask = shape_mask(kind, round(SIDE * SUPERSAMPLE * rng.uniform(0.45, 0.75)), False)
    ink = np.array(COLORS[color]) + rng.normal(0, 10, 3)
    return on_paper(mask, rng, style, ink=ink, light=True)


def color(name: str, rng: np.random.Generator, style: Style) -> Image.Image:
    """Returns a surface of one color; varied ones are unevenly lit, stained and further off the
    hue.

    Args:
        name: of the color.
        rng: draws the tone.
        style: plain or varied.
    """
    base = np.array(COLORS[name]) + rng.normal(0, 8 if style == "plain" else 16, 3)
    pixels = np.broadcast_to(base, (SIDE, SIDE, 3)).astype(np.float64)
    if style == "varied":
        pixels = pixels * _smooth(rng, 0.45, 1.35)[..., None]
        stain = (_smooth(rng, 0, 1) > rng.uniform(0.6, 0.9))[..., None]
        pixels = np.where(stain, np.full(3, rng.uniform(0, 255)), pixels)
    return _finish(pixels, rng, 6)


def letter(name: str, rng: np.random.Generator, style: Style) -> Image.Image:
    """Returns a printed capital; the faces of the two styles are disjoint.

    Args:
        name: the letter.
        rng: draws face, place, size and colors.
        style: plain or varied.
    """
    return printed(name, FACES[style], 0.55, 0.85, rng, style)


def word(name: str, rng: np.random.Generator, style: Style) -> Image.Image:
    """Returns a printed word of three letters; the faces of the two styles are disjoint.

    Args:
        name: the word.
        rng: draws face, place, size and colors.
        style: plain or varied.
    """
    return printed(name, FACES[style], 0.34, 0.44, rng, style)


def symbol(name: str, rng: np.random.Generator, style: Style) -> Image.Image:
    """Returns a printed mathematical symbol; the faces of the two styles are disjoint.

    Args:
        name: of the symbol.
        rng: draws face, place, size and colors.
        style: plain or varied.
    """
    return printed(SYMBOLS[name], SYMBOL_FACES[style], 0.6, 0.9, rng, style)


def texture(name: str, rng: np.random.Generator, style: Style) -> Image.Image:
    """Returns a drawn pattern of two tones; varied ones are turned by up to 25 degrees and warped.

    Args:
        name: of the pattern.
        rng: draws tones, phase and scale.
        style: plain or varied.
    """
    return pattern(TEXTURES[name], rng, style)


def pattern(
    tone: Tone, rng: np.random.Generator, style: Style, colored: bool = False
) -> Image.Image:
    """Returns a pattern of two tones, or of a color and a darker one.

    Args:
        tone: the pattern.
        rng: draws tones, phase and scale.
        style: plain or varied, which is turned by up to 25 degrees and warped.
        colored: whether it has colors.
    """
    rows, columns = np.mgrid[0:SIDE, 0:SIDE].astype(np.float64)
    if style == "varied":
        turn = np.radians(rng.uniform(-25, 25))
        rows, columns = (
            rows * np.cos(turn) - columns * np.sin(turn) + 3 * _smooth(rng, -1, 1),
            rows * np.sin(turn) + columns * np.cos(turn) + 3 * _smooth(rng, -1, 1),
        )
    rows, columns = rows + rng.uniform(0, 40), columns + rng.uniform(0, 40)
    share = tone(rows, columns, rng.uniform(7, 13), rng)
    if colored:
        paper = list(COLORS.values())[int(rng.integers(len(COLORS)))] + rng.normal(0, 16, 3)
        ink = paper * rng.uniform(0.1, 0.4)
    else:
        ink, paper = _two_tones(rng, style)
    return _finish(paper + (ink - paper) * share[..., None], rng, 6)


def digit_image(
    drawing: NDArray[np.float64], rng: np.random.Generator, style: Style
) -> Image.Image:
    """Returns an 8 x 8 drawing of scikit-learn's, enlarged; plain ones are white on black.

    Args:
        drawing: gray values (8, 8).
        rng: draws place, size and colors.
        style: plain or varied.
    """
    size = int(rng.integers(34, 47))
    mask = Image.fromarray((drawing * (255 / 16)).astype(np.uint8)).resize((size, size), 3)
    if style == "varied":
        mask = mask.rotate(float(rng.uniform(-15, 15)), Image.Resampling.BILINEAR)
        return on_paper(mask, rng, style)
    return on_paper(mask, rng, style, ink=np.full(3, 240.0), light=False)


def crop(name: str, cell: tuple[int, int], rng: np.random.Generator, grid: int = 4) -> Image.Image:
    """Returns a random part of one cell of a photograph cut into `grid` x `grid` cells.

    Args:
        name: of the photograph.
        cell: row and column.
        rng: draws the part.
        grid: cells along each side.
    """
    picture = _photograph(name)
    width, height = picture.width // grid, picture.height // grid
    corner = (cell[0] * width, cell[1] * height)
    # cut first: resampling a box of the whole would read pixels of the neighbors
    alone = picture.crop((*corner, corner[0] + width, corner[1] + height))
    side = float(rng.uniform(0.6, 1.0)) * min(width, height)
    left, top = float(rng.uniform(0, width - side)), float(rng.uniform(0, height - side))
    box = (left, top, left + side, top + side)
    cut = alone.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box)
    return cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else cut


@lru_cache(maxsize=256)
def font(face: str, size: int) -> ImageFont.FreeTypeFont:
    """Returns one of matplotlib's fonts, `size` pixels high.

    Raises:
        InputError: if matplotlib is not installed.
    """
    try:
        folder = files("matplotlib").joinpath("mpl-data/fonts/ttf")
    except ModuleNotFoundError:
        raise InputError("the embedded streams need fonts: pip install 'vlm-prune[clip]'") from None
    return ImageFont.truetype(BytesIO(folder.joinpath(f"{face}.ttf").read_bytes()), size)


def printed(
    text: str,
    faces: tuple[str, ...],
    smallest: float,
    largest: float,
    rng: np.random.Generator,
    style: Style,
) -> Image.Image:
    """Draws printed text, in one of a few fonts and sizes.

    Args:
        text: what is written.
        faces: fonts to draw from.
        smallest: size as a share of the picture's.
        largest: likewise.
        rng: draws font, size, angle and colors.
        style: plain or varied, which is also rotated.
    """
    face = faces[int(rng.integers(len(faces)))]
    # few sizes, so that the fonts stay in memory
    size = round(SIDE * SUPERSAMPLE / 2 * (smallest + (largest - smallest) * rng.integers(5) / 4))
    canvas = Image.new("L", (SIDE * SUPERSAMPLE // 2,) * 2)
    middle = (canvas.width / 2, canvas.height / 2)
    ImageDraw.Draw(canvas).text(middle, text, 255, font(face, size), anchor="mm")
    if style == "varied":
        canvas = canvas.rotate(float(rng.uniform(-15, 15)), Image.Resampling.BILINEAR)
    return on_paper(canvas, rng, style)


def on_paper(
    mask: Image.Image,
    rng: np.random.Generator,
    style: Style,
    ink: NDArray[np.float64] | None = None,
    light: bool | None = None,
    paper: NDArray[np.float64] | None = None,
) -> Image.Image:
    """Draws ink through a mask, shifted a little, on paper that is dark or light.

    Args:
        mask: how much ink a pixel gets.
        rng: draws shift, tones and noise.
        style: plain or varied.
        ink: color (3,); drawn unless given.
        light: whether the paper is light; drawn unless given.
        paper: color (3,); drawn unless given.
    """
    scale = SUPERSAMPLE if mask.width > 2 * SIDE else 2 if mask.width > SIDE else 1
    side = SIDE * scale
    canvas = Image.new("L", (side, side))
    room = max(2, side - mask.width)
    shift = rng.uniform(-0.35, 0.35, 2) * min(room, side // 4)
    corner = ((side - mask.width) / 2 + shift[0], (side - mask.height) / 2 + shift[1])
    canvas.paste(mask, (round(corner[0]), round(corner[1])))
    alpha = np.asarray(canvas, np.float64).reshape(SIDE, scale, SIDE, scale).mean((1, 3)) / 255
    tones = _two_tones(rng, style, light)
    ink = tones[0] if ink is None else ink
    paper = tones[1] if paper is None else paper
    return _finish(paper + (ink - paper) * alpha[..., None], rng, 4 if style == "plain" else 10)


def _two_tones(
    rng: np.random.Generator, style: Style, light: bool | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Draws the colors (3,) of ink and paper, one dark and one light; varied ones are tinted.

    Args:
        rng: draws them.
        style: plain or varied.
        light: whether the paper is the light one; drawn unless given.
    """
    tint = 12 if style == "plain" else 45
    dark = rng.uniform(5, 60) + rng.uniform(-tint, tint, 3)
    bright = rng.uniform(195, 250) + rng.uniform(-tint, tint, 3)
    light = bool(rng.random() < 0.5) if light is None else light
    return (dark, bright) if light else (bright, dark)


def _smooth(rng: np.random.Generator, low: float, high: float) -> NDArray[np.float64]:
    """Draws a smooth random field (SIDE, SIDE) from about `low` to `high`."""
    coarse = Image.fromarray(rng.uniform(low, high, (5, 5)).astype(np.float32))
    return np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float64)


def _finish(pixels: NDArray[np.float64], rng: np.random.Generator, noise: float) -> Image.Image:
    noisy = pixels + rng.normal(0, noise, (SIDE, SIDE, 1))
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))
