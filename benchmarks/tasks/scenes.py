"""Scenes: photographs with colored digits, shapes and words on them, made from a seed.

Photographs are scikit-image's and scikit-learn's bundled pictures with contrast and saturation
lowered, handwritten digits are scikit-learn's; both are split by image, so that nothing drawn in
a test scene was ever seen in training.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageEnhance, ImageFont, ImageStat

from vlm_prune.benchmarks.tasks.base import Question, Sample, Split, Turn
from vlm_prune.vlm.common.package_data import handwritten_digits, photograph

SIDE = 336
PATCH = 14
GRID = SIDE // PATCH

SHAPE_SIZES = (14, 28, 42)
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
DIGITS = tuple("0123456789")
WORDS = ("cat", "dog", "sun", "key", "hat", "box", "pen", "map")
KINDS = {"shape": SHAPES, "digit": DIGITS, "word": WORDS}
NAMES = SHAPES + DIGITS + WORDS
COLORS = {
    "red": (225, 20, 20),
    "green": (10, 160, 30),
    "blue": (25, 60, 235),
    "yellow": (245, 225, 10),
    "purple": (145, 20, 180),
    "cyan": (0, 225, 230),
    "white": (255, 255, 255),
    "black": (0, 0, 0),
}
PHOTOGRAPHS: dict[Split, tuple[str, ...]] = {
    "train": (
        "astronaut.png", "coffee.png", "motorcycle_left.png", "brick.png", "grass.png", "ihc.png",
        "hubble_deep_field.jpg", "coins.png", "china.jpg",
    ),
    "val": ("gravel.png", "retina.jpg"),
    "test": ("chelsea.png", "flower.jpg", "rocket.jpg"),
}  # fmt: skip

Shares = tuple[float, float, float]
SHARES: Shares = (0.4, 0.35, 0.25)
CONTRAST = 0.5
_SUPERSAMPLE = 4


@dataclass(frozen=True)
class Thing:
    """One object: its kind, what it is, its color, and its center and extent in pixels."""

    kind: str
    name: str
    color: str
    x: float
    y: float
    width: int
    height: int

    @property
    def noun(self) -> str:
        """Returns how a question names it: `star`, `digit 7`, `word cat`."""
        return noun(self.name)


@dataclass(frozen=True)
class Scene:
    """An image, its objects, and for each of the 24 x 24 patches what it shows.

    `patch_names` holds an index into `NAMES` plus one, `patch_colors` an index into `COLORS`;
    0 and -1 stand for background.
    """

    pixels: NDArray[np.uint8]
    things: tuple[Thing, ...]
    patch_names: NDArray[np.int64]
    patch_colors: NDArray[np.int64]

    @property
    def image(self) -> Image.Image:
        """Returns the scene as an RGB image."""
        return Image.fromarray(self.pixels)

    def of_kind(self, *kinds: str) -> list[Thing]:
        """Returns the objects of these kinds."""
        return [thing for thing in self.things if thing.kind in kinds]


def noun(name: str) -> str:
    """Returns the name with its kind, where the bare name would be ambiguous."""
    if name in DIGITS:
        return f"digit {name}"
    return f"word {name}" if name in WORDS else name


def make_scene(
    rng: np.random.Generator,
    split: Split,
    things: int | None = None,
    shares: Shares = SHARES,
) -> Scene:
    """Returns a scene of objects with different names and colors.

    The first is a shape, the second a digit or a word, the others are shapes, digits and words.

    Args:
        rng: draws the scene.
        split: decides which photographs and handwritten digits it may use.
        things: how many objects; 3 to 6 unless given.
        shares: of shapes, digits and words among the others.
    """
    pixels = background(rng, split)
    for _ in range(int(rng.integers(0, 4))):
        _distract(rng, pixels)
    count = int(rng.integers(3, 7)) if things is None else things
    kinds = ["shape", str(rng.choice(["digit", "word"]))]
    kinds += [str(kind) for kind in rng.choice(list(KINDS), size=count, p=shares)]
    colors = rng.permutation(list(COLORS))
    placed: list[Thing] = []
    patch_names = np.zeros((GRID, GRID), np.int64)
    patch_colors = np.full((GRID, GRID), -1, np.int64)
    for kind, color in zip(kinds[:count], colors, strict=False):
        free = [name for name in KINDS[kind] if name not in {thing.name for thing in placed}]
        name = str(rng.choice(free))
        alpha = sprite(rng, kind, name, split)
        height, width = alpha.shape
        corner = _free_corner(rng, placed, width, height)
        if corner is None:
            continue
        left, top = corner
        placed.append(
            Thing(kind, name, str(color), left + width / 2, top + height / 2, width, height)
        )
        region = pixels[top : top + height, left : left + width]
        ink = np.array(COLORS[str(color)], np.float32)
        region[:] = (region * (1 - alpha[..., None]) + ink * alpha[..., None]).astype(np.uint8)
        # which patches show it: names from 1, as 0 is the background
        rows, columns, mine = _covered(alpha, left, top)
        patch_names[rows, columns][mine] = NAMES.index(name) + 1
        patch_colors[rows, columns][mine] = list(COLORS).index(str(color))
    return Scene(pixels, tuple(placed), patch_names, patch_colors)


def _covered(
    alpha: NDArray[np.float32], left: int, top: int, least: float = 0.08
) -> tuple[slice, slice, NDArray[np.bool_]]:
    """Returns the block of patches a sprite touches, and which of them
    it covers by at least `least`.

    Args:
        alpha: the sprite's opacity, (height, width).
        left: its first column in pixels.
        top: its first row in pixels.
        least: share of a patch; less where no patch is covered that far.
    """
    height, width = alpha.shape
    # all patches that the sprite touches, and its opacity on their pixels
    rows = slice(top // PATCH, (top + height - 1) // PATCH + 1)
    columns = slice(left // PATCH, (left + width - 1) // PATCH + 1)
    down, across = rows.stop - rows.start, columns.stop - columns.start
    cover = np.zeros((down * PATCH, across * PATCH), np.float32)
    cover[top % PATCH :, left % PATCH :][:height, :width] = alpha
    share = cover.reshape(down, PATCH, across, PATCH).mean((1, 3))
    return rows, columns, share >= min(least, float(share.max()))


@cache
def _photograph(name: str) -> Image.Image:
    picture = photograph(name)
    shorter = min(picture.size)
    if shorter > 400:  # crops are 200 px or more: nothing visible is lost, and drawing is faster
        picture.thumbnail((picture.width * 400 // shorter, picture.height * 400 // shorter))
    return picture


@cache
def _digits(split: Split) -> dict[str, NDArray[np.float32]]:
    drawings, digits = handwritten_digits()
    part = np.array(["train"] * 7 + ["val"] + ["test"] * 2)[np.arange(len(digits)) % 10]
    images = (drawings / 16.0).astype(np.float32)
    return {digit: images[(part == split) & (digits == int(digit))] for digit in DIGITS}


def background(rng: np.random.Generator, split: Split, side: int = SIDE) -> NDArray[np.uint8]:
    """Returns a muted crop of a photograph of the split, (side, side, 3).

    Args:
        rng: draws photograph, crop and brightness.
        split: decides which photographs it may use.
        side: of the result, in pixels.
    """
    picture = _photograph(str(rng.choice(PHOTOGRAPHS[split])))
    size = int(rng.integers(200, min(picture.size) + 1))
    left = int(rng.integers(0, picture.width - size + 1))
    top = int(rng.integers(0, picture.height - size + 1))
    box = (left, top, left + size, top + size)
    crop = picture.resize((side, side), Image.Resampling.BILINEAR, box)
    if rng.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    muted = ImageEnhance.Color(crop).enhance(0.5)
    shift = rng.uniform(110, 150) - CONTRAST * ImageStat.Stat(muted.convert("L")).mean[0]
    curve = np.clip(shift + CONTRAST * np.arange(256), 50, 205).astype(np.uint8)
    lit: NDArray[np.uint8] = np.array(muted.point([int(v) for v in curve] * 3))
    return lit


def _distract(rng: np.random.Generator, pixels: NDArray[np.uint8]) -> None:
    width, height = (int(v) for v in rng.integers(5, 16, size=2))
    left, top = int(rng.integers(0, SIDE - width)), int(rng.integers(0, SIDE - height))
    pixels[top : top + height, left : left + width] = int(rng.integers(70, 190))


def _free_corner(
    rng: np.random.Generator, placed: list[Thing], width: int, height: int, margin: int = 8
) -> tuple[int, int] | None:
    """Draws a corner clear of everything placed so far; None if it finds none in 60 tries.

    What fits into one patch stands on the patch grid, so that one token carries it; the rest
    stands anywhere.

    Args:
        rng: draws it.
        placed: things with their places.
        width: of what is placed.
        height: of what is placed.
        margin: least distance to others, in pixels.
    """
    step = PATCH if max(width, height) <= PATCH else 1
    for _ in range(60):
        left = step * int(rng.integers(0, (SIDE - width) // step + 1))
        top = step * int(rng.integers(0, (SIDE - height) // step + 1))
        x, y = left + width / 2, top + height / 2
        if all(
            abs(x - other.x) > (width + other.width) / 2 + margin
            or abs(y - other.y) > (height + other.height) / 2 + margin
            for other in placed
        ):
            return left, top
    return None


def sprite(
    rng: np.random.Generator,
    kind: str,
    name: str,
    split: Split,
    sizes: tuple[int, ...] = SHAPE_SIZES,
) -> NDArray[np.float32]:
    """Returns the opacity in [0, 1] of a drawing, (height, width).

    Args:
        rng: draws its size, and which handwritten digit it is.
        kind: `shape`, `digit` or `word`.
        name: what it shows.
        split: decides which handwritten digits it may use.
        sizes: of shapes, in pixels.
    """
    if kind == "digit":
        size = int(rng.choice([28, 42]))
        drawing = _digits(split)[name]
        drawing = drawing[int(rng.integers(len(drawing)))]
        mask = Image.fromarray((drawing * 255).astype(np.uint8))
        mask = mask.resize((size, size), Image.Resampling.BICUBIC)
        return np.clip(np.asarray(mask, np.float32) / 255 * 1.35 - 0.2, 0, 1)
    if kind == "word":
        size = int(rng.choice([22, 30]))
        canvas = Image.new("L", (2 * 28, 28) if size == 22 else (5 * PATCH, 3 * PATCH))
        middle = (canvas.width / 2, canvas.height / 2)
        font = ImageFont.load_default(size)
        ImageDraw.Draw(canvas).text(middle, name, 255, font, anchor="mm", stroke_width=0.5)
        return _opacity(canvas)
    size = int(rng.choice(sizes))
    canvas = Image.new("L", (size * _SUPERSAMPLE, size * _SUPERSAMPLE))
    _draw_shape(ImageDraw.Draw(canvas), name, size * _SUPERSAMPLE)
    return _opacity(canvas.resize((size, size), Image.Resampling.BOX))


def _opacity(mask: Image.Image) -> NDArray[np.float32]:
    return np.asarray(mask, np.float32) / np.float32(255)


def _draw_shape(draw: ImageDraw.ImageDraw, name: str, side: int) -> None:
    last, third = side - 1, side / 3
    if name == "circle":
        draw.ellipse((0, 0, last, last), 255)
    elif name == "square":
        draw.rectangle((side * 0.06, side * 0.06, side * 0.94, side * 0.94), 255)
    elif name == "triangle":
        draw.polygon([(side / 2, 0), (last, last), (0, last)], 255)
    elif name == "cross":
        draw.rectangle((third, 0, 2 * third, last), 255)
        draw.rectangle((0, third, last, 2 * third), 255)
    elif name == "ring":
        draw.ellipse((0, 0, last, last), 255)
        draw.ellipse((side * 0.28, side * 0.28, side * 0.72, side * 0.72), 0)
    else:
        angles = np.pi * (np.arange(10) / 5 - 0.5)
        radii = np.where(np.arange(10) % 2 == 0, 0.5, 0.2) * side
        points = zip(
            side / 2 + radii * np.cos(angles), side / 2 + radii * np.sin(angles), strict=True
        )
        draw.polygon([(float(x), float(y)) for x, y in points], 255)


def about_scene(
    ask: Callable[[np.random.Generator, Scene], Question | None],
) -> Callable[[np.random.Generator, Split], Sample]:
    """Returns a sample maker that shows a new scene and asks one question about it."""

    def make(rng: np.random.Generator, split: Split) -> Sample:
        while True:
            scene = make_scene(rng, split)
            if (question := ask(rng, scene)) is not None:
                turn = Turn(question.text, (scene.image,))
                return Sample((turn,), question.answer, question.subset)

    return make
