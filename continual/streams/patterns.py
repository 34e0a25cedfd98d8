"""Shapes and textures of the packaged stream, as masks and tones without color."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SIDE = 48
SUPERSAMPLE = 4
SHAPES = (
    "circle", "square", "triangle", "pentagon", "star",
    "cross", "ring", "crescent", "heart", "arrow",
)  # fmt: skip


def shape_mask(name: str, size: int, outline: bool) -> Image.Image:
    """Returns the opacity of a shape on a supersampled canvas.

    Args:
        name: of the shape.
        size: its width in pixels.
        outline: whether it is not filled.
    """
    side = SIDE * SUPERSAMPLE
    canvas = Image.new("L", (side, side))
    draw = ImageDraw.Draw(canvas)
    width = max(2, size // 12)

    def polygon(points: NDArray[np.float64]) -> None:
        corners = [(float(x), float(y)) for x, y in side / 2 + points * size / 2]
        if outline:
            draw.line([*corners, corners[0], corners[1]], 255, width, joint="curve")
        else:
            draw.polygon(corners, 255)

    def disc(x: float, radius: float, ink: int, edge: bool = outline) -> None:
        center, reach = side / 2 + x * size / 2, radius * size / 2
        box = (center - reach, side / 2 - reach, center + reach, side / 2 + reach)
        draw.ellipse(box, None if edge else ink, ink if edge else None, width)

    if name == "circle":
        disc(0, 1, 255)
    elif name == "ring":
        disc(0, 1, 255)
        disc(0, 0.55, 255 if outline else 0)
    elif name == "crescent":
        turn = np.linspace(0.35, 2 * np.pi - 0.35, 40)
        outer = np.stack([np.cos(turn), np.sin(turn)], 1)
        inner = outer[::-1] * [0.72, 0.72] + [0.35, 0]
        polygon(np.concatenate([outer, inner]) - [0.1, 0])
    else:
        polygon(OUTLINES[name])
    return canvas


def _regular(corners: int, inner: float = 1.0) -> NDArray[np.float64]:
    turn = 2 * np.pi * np.arange(corners) / corners - np.pi / 2
    radius = np.where(np.arange(corners) % 2 == 0, 1.0, inner)[:, None]
    corners_at: NDArray[np.float64] = radius * np.stack([np.cos(turn), np.sin(turn)], 1)
    return corners_at


def _heart() -> NDArray[np.float64]:
    t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x, y], 1) / 16


_STEPS = [(1, 3), (1, 1), (3, 1), (3, -1), (1, -1), (1, -3)]
OUTLINES: dict[str, NDArray[np.float64]] = {
    "square": np.array([(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]),
    "triangle": _regular(3),
    "pentagon": _regular(5),
    "star": _regular(10, 0.4),
    "cross": np.array(_STEPS + [(-x, -y) for x, y in _STEPS]) / 3,
    "heart": _heart(),
    "arrow": np.array(
        [(-1, -0.25), (0.1, -0.25), (0.1, -0.7), (1, 0), (0.1, 0.7), (0.1, 0.25), (-1, 0.25)]
    ),
}

Pattern = NDArray[np.floating[Any]]
Tone = Callable[[NDArray[np.float64], NDArray[np.float64], float, np.random.Generator], Pattern]


def _bricks(y: NDArray[np.float64], x: NDArray[np.float64], p: float) -> NDArray[np.float64]:
    course = np.floor(y / p)
    joint = (y % p < 0.22 * p) | ((x + course % 2 * p) % (2 * p) < 0.22 * p)
    return joint.astype(np.float64)


def _spots(y: NDArray[np.float64], x: NDArray[np.float64], p: float) -> NDArray[np.float64]:
    return (np.hypot(y % p - p / 2, x % p - p / 2) < 0.32 * p).astype(np.float64)


def _speckles(p: float, rng: np.random.Generator) -> NDArray[np.float64]:
    share = rng.uniform(0.15, 0.3)
    return (rng.random((SIDE // 2, SIDE // 2)) < share).repeat(2, 0).repeat(2, 1).astype(np.float64)


TEXTURES: dict[str, Tone] = {
    "horizontal stripes": lambda y, x, p, _: (y % p < p / 2).astype(np.float64),
    "vertical stripes": lambda y, x, p, _: (x % p < p / 2).astype(np.float64),
    "checkerboard": lambda y, x, p, _: (np.floor(y / p) + np.floor(x / p)) % 2,
    "polka dots": lambda y, x, p, _: _spots(y, x, p),
    "rings": lambda y, x, p, _: (np.hypot(y - y.mean(), x - x.mean()) % p < p / 2) * 1.0,
    "zigzag": lambda y, x, p, _: ((y + np.abs(x % (2 * p) - p)) % p < p / 2) * 1.0,
    "bricks": lambda y, x, p, _: _bricks(y, x, p),
    "mesh": lambda y, x, p, _: ((y % p < 0.2 * p) | (x % p < 0.2 * p)) * 1.0,
    "waves": lambda y, x, p, _: 0.5 + 0.5 * np.sin(2 * np.pi * (y + 3 * np.sin(x / 3)) / p),
    "speckles": lambda y, x, p, rng: _speckles(p, rng),
}
