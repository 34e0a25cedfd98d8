"""What a stream is made of."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True)
class Task:
    """A named classification data set: class names, prompt templates, and three splits."""

    name: str
    classes: tuple[str, ...]
    templates: tuple[str, ...]  # with one "{}"
    train: Sequence[tuple[Image.Image, int]]  # map-style, lazily loaded
    val: Sequence[tuple[Image.Image, int]]
    test: Sequence[tuple[Image.Image, int]]
