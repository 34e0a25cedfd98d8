"""An embedded stream of eight domains and 100 classes; nothing is downloaded.

Pictures are drawn from seeds or cut from what PyPI packages bring along, 48 x 48. The splits of a
domain share no seed; those of `digits` share no handwritten drawing, and those of `photographs`,
which has one photograph per class, no pixel of it. Of every domain the embedded CLIP has seen
some classes, in the plain style only; the stream's own splits are in the varied style, but for
photographs, which have one style. Another version of Pillow may draw the edges of glyphs a little
differently.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Literal

import numpy as np
from PIL import Image

from vlm_prune.continual.streams import drawing, patterns
from vlm_prune.continual.streams.base import Labeled, LabeledImages, StreamTask
from vlm_prune.continual.streams.drawing import Style
from vlm_prune.vlm.common.package_data import handwritten_digits
from vlm_prune.vlm.common.registry import Registry

PackagedSplit = Literal["pretraining", "train", "val", "test"]
DrawSplit = Callable[[str, PackagedSplit, int, np.random.Generator, Style], Image.Image]
SEED = 20260
PER_CLASS: dict[PackagedSplit, int] = {"pretraining": 200, "train": 32, "val": 8, "test": 24}
SPLITS: tuple[PackagedSplit, ...] = ("pretraining", "train", "val", "test")

PHOTOGRAPHS = {
    "astronaut": "astronaut.png",
    "brick wall": "brick.png",
    "cat": "chelsea.png",
    "coins": "coins.png",
    "coffee cup": "coffee.png",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "galaxies": "hubble_deep_field.jpg",
    "stained tissue": "ihc.png",
    "moon surface": "moon.png",
    "retina": "retina.jpg",
    "motorcycle": "motorcycle_left.png",
    "temple": "china.jpg",
    "dahlia": "flower.jpg",
}
_GRID = 4
_CELLS: dict[PackagedSplit, slice] = {
    "pretraining": slice(0, 5),
    "train": slice(5, 10),
    "val": slice(10, 12),
    "test": slice(12, 16),
}
# numbers of a digit's drawings, of which there are 174 or more
_DRAWINGS: dict[PackagedSplit, int] = {"pretraining": 0, "train": 110, "val": 142, "test": 150}


@dataclass(frozen=True)
class Domain:
    """One domain: how a class is drawn, and which classes the embedded CLIP has seen.

    `number` goes into the seeds of its pictures; no two domains have the same.
    """

    number: int
    name: str
    classes: tuple[str, ...]
    known: tuple[str, ...]
    templates: tuple[str, ...]
    draw: DrawSplit


class Drawn(LabeledImages):
    """Pictures of some classes of a domain, class after class in turn; drawn once, when asked for.

    Args:
        domain: what is drawn.
        split: train, val or test.
        classes: of the domain.
        style: plain or varied.
    """

    def __init__(
        self, domain: Domain, split: PackagedSplit, classes: tuple[str, ...], style: Style
    ) -> None:
        self.domain, self.split, self.classes, self.style = domain, split, classes, style
        self._drawn: dict[int, Labeled] = {}

    @property
    def labels(self) -> list[int]:
        return [index % len(self.classes) for index in range(len(self))]

    def __len__(self) -> int:
        return PER_CLASS[self.split] * len(self.classes)

    def item(self, index: int) -> Labeled:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        if index not in self._drawn:
            self._drawn[index] = self._draw(index)
        return self._drawn[index]

    def _draw(self, index: int) -> Labeled:
        count, label = divmod(index, len(self.classes))
        name = self.classes[label]
        labels = self.domain.classes.index(name), SPLITS.index(self.split)
        rng = np.random.default_rng((SEED, self.domain.number, *labels, count))
        return self.domain.draw(name, self.split, count, rng, self.style), label


def packaged() -> tuple[StreamTask, ...]:
    """Returns the eight tasks in the stream's order; `scenes` is not one of them."""
    return tuple(task(name) for name in DOMAINS if name != "scenes")


def task(name: str) -> StreamTask:
    """Returns one domain as a task, its splits in the varied style.

    `scenes` (colored shapes, all seen in pre-training) belongs to no stream; it is there to
    measure what a stream makes the embedded CLIP forget.

    Raises:
        InputError: if there is no such domain.
    """
    return drawn_task(DOMAINS[name])


def drawn_task(domain: Domain) -> StreamTask:
    """Returns a domain as a task, its splits in the varied style."""
    train, val, test = (
        Drawn(domain, split, domain.classes, "varied") for split in SPLITS if split != "pretraining"
    )
    return StreamTask(domain.name, domain.classes, domain.templates, train, val, test)


def by_seed(draw: drawing.Draw) -> DrawSplit:
    """Returns a domain's `draw` of pictures whose splits differ by their seeds alone."""
    return lambda name, _, __, rng, style: draw(name, rng, style)


def _digit(
    name: str, split: PackagedSplit, count: int, rng: np.random.Generator, style: Style
) -> Image.Image:
    """Draws a handwritten digit of scikit-learn's, other ones in each split.

    Args:
        name: of the digit, in English.
        split: decides which drawings are used.
        count: number of the picture among those of its class.
        rng: draws colors, angle and noise.
        style: plain or varied.
    """
    images, target = handwritten_digits()
    drawings = images[target == DIGITS.index(name)]
    size = 110 if split == "pretraining" else PER_CLASS[split]
    return drawing.digit_image(drawings[_DRAWINGS[split] + count % size], rng, style)


def cropped(pictures: Mapping[str, str], first: int = 0) -> DrawSplit:
    """Returns a domain's `draw` of crops of one cell of a picture, other cells in each split.

    Crops have one style: photographs are what they are.

    Args:
        pictures: file of each class.
        first: number of the first picture; numbers decide which cells each split has.
    """

    def draw(
        name: str, split: PackagedSplit, count: int, rng: np.random.Generator, style: Style
    ) -> Image.Image:
        number = first + list(pictures).index(name)
        order = np.random.default_rng((SEED, number)).permutation(_GRID**2)
        cells = order[_CELLS[split]]
        row, column = divmod(int(cells[count % len(cells)]), _GRID)
        return drawing.crop(pictures[name], (column, row), rng, _GRID)

    return draw


DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS = ("sun", "key", "hat", "box", "pen", "map", "cup", "bed")
SCENES = tuple(
    f"{color} {shape}" for color in tuple(drawing.COLORS)[:6] for shape in patterns.SHAPES[:6]
)
DOMAINS: Registry[Domain] = Registry(
    "domain",
    {
        domain.name: domain
        for domain in (
            Domain(
                0, "digits", DIGITS, DIGITS[:6],
                ("a handwritten {}.", "the digit {}, written by hand."), _digit,
            ),
            Domain(
                1, "letters", tuple(ascii_uppercase), tuple("ABDEGHJKMNPRSTUXYZ"),
                ("the letter {}.", "a printed capital {}."), by_seed(drawing.letter),
            ),
            Domain(
                2, "words", WORDS, WORDS[:5],
                ('the word "{}".', 'a printed word that says "{}".'), by_seed(drawing.word),
            ),
            Domain(
                3, "symbols", tuple(drawing.SYMBOLS), tuple(drawing.SYMBOLS)[:8],
                ("the mathematical symbol {}.", "a printed {} sign."), by_seed(drawing.symbol),
            ),
            Domain(
                4, "shapes", patterns.SHAPES, patterns.SHAPES[:6],
                ("a drawing of a {}.", "the shape of a {}."), by_seed(drawing.shape),
            ),
            Domain(
                5, "colours", tuple(drawing.COLORS), tuple(drawing.COLORS)[:6],
                ("a {} surface.", "the colour {}."), by_seed(drawing.color),
            ),
            Domain(
                6, "textures", tuple(patterns.TEXTURES), tuple(patterns.TEXTURES)[:6],
                ("a pattern of {}.", "a surface with {}."), by_seed(drawing.texture),
            ),
            Domain(
                7, "photographs", tuple(PHOTOGRAPHS), tuple(PHOTOGRAPHS)[:8],
                ("a photo of {}.", "a close-up photo of {}."), cropped(PHOTOGRAPHS),
            ),
            Domain(
                8, "scenes", SCENES, SCENES,
                ("a {}.", "a picture of a {}."), by_seed(drawing.scene),
            ),
        )
    },
)  # fmt: skip
