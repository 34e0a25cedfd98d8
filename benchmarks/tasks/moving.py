"""Moving scenes: photographs over which shapes and words appear, pass and go, made from a seed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlm_prune.benchmarks.tasks.base import Question, Sample, Split, Turn
from vlm_prune.benchmarks.tasks.scenes import COLORS, SHAPES, WORDS, background, sprite
from vlm_prune.vlm.common.video import VideoClip

FRAMES = 16
FRAME_SIDE = 168  # pixels: half a scene's, so that a video costs no more than some images
LARGE = (28, 42)  # sides of shapes: at least what a token shows that is pooled over 2 x 2 patches
FPS = 2.0
TOKEN_SIDE = 28  # pixels along a side of what a token shows that is pooled over 2 x 2 patches
ACROSS = FRAME_SIDE // TOKEN_SIDE
CELLS = 3  # along a side: still things stand in different cells of a grid
NOISE = 3  # levels by which every pixel of a frame may change


@dataclass(frozen=True)
class Actor:
    """A thing of a video.

    Args:
        kind: `shape` or `word`.
        name: what it is.
        color: its color.
        path: left and top of its sprite in each frame, as shares of what the picture leaves free; None
            where it is not seen.
    """

    kind: str
    name: str
    color: str
    path: tuple[tuple[float, float] | None, ...]

    @property
    def seen(self) -> list[int]:
        """Returns the numbers of the frames that show it."""
        return [frame for frame, at in enumerate(self.path) if at is not None]


@dataclass(frozen=True)
class Movie:
    """A video, what moves in it, and a question about that."""

    actors: tuple[Actor, ...]
    question: Question


def cast(rng: np.random.Generator, count: int, kind: str = "shape") -> list[tuple[str, str, str]]:
    """Returns kind, name and color of things that share neither name nor color.

    Args:
        rng: draws them.
        count: how many.
        kind: `shape` or `word`.
    """
    names = rng.permutation({"shape": SHAPES, "word": WORDS}[kind])[:count]
    colors = rng.permutation(list(COLORS))[:count]
    return [(kind, str(name), str(color)) for name, color in zip(names, colors, strict=True)]


def spots(rng: np.random.Generator, count: int) -> list[tuple[float, float]]:
    """Returns `count` places that are apart, each in a cell of its own."""
    cells = rng.permutation(CELLS * CELLS)[:count]
    return [
        (
            (cell % CELLS + rng.uniform(0.4, 0.6)) / CELLS,
            (cell // CELLS + rng.uniform(0.4, 0.6)) / CELLS,
        )
        for cell in cells
    ]


def at_rest(
    at: tuple[float, float], frames: int, first: int, end: int
) -> tuple[tuple[float, float] | None, ...]:
    """Returns the path of what stands at one place from the frame `first` to before `end`.

    Args:
        at: the place.
        frames: of the video.
        first: that shows it.
        end: that no longer does.
    """
    return tuple(at if first <= frame < end else None for frame in range(frames))


def still_things(
    rng: np.random.Generator,
    times: Sequence[tuple[int, int]],
    frames: int = FRAMES,
    kind: str = "shape",
) -> tuple[Actor, ...]:
    """Returns things that stand apart, one for each time.

    Args:
        rng: draws what they are and where.
        times: first frame that shows each, and the one before which it goes.
        frames: of the video.
        kind: `shape` or `word`.
    """
    count = len(times)
    return tuple(
        Actor(*thing, at_rest(at, frames, *time))
        for thing, at, time in zip(cast(rng, count, kind), spots(rng, count), times, strict=True)
    )


def clip_of(rng: np.random.Generator, split: Split, actors: tuple[Actor, ...]) -> VideoClip:
    """Returns the frames of a video, as `film` makes them.

    Args:
        rng: draws them.
        split: decides which photographs they may use.
        actors: what they show.
    """
    return film(rng, split, actors)[0]


def film(
    rng: np.random.Generator, split: Split, actors: tuple[Actor, ...]
) -> tuple[VideoClip, list[NDArray[np.float32]]]:
    """Returns the frames of a video, two a second, and the opacity of each actor's drawing.

    Args:
        rng: draws the picture behind, the drawings and the noise.
        split: decides which photographs it may use.
        actors: what it shows, later ones in front.
    """
    frames = len(actors[0].path)
    shown = np.repeat(background(rng, split, FRAME_SIDE)[None], frames, 0)
    drawings = []
    for actor in actors:
        drawing = sprite(rng, actor.kind, actor.name, split, LARGE)
        drawings.append(drawing)
        for frame in actor.seen:
            paste(shown[frame], drawing, actor.color, actor.path[frame] or (0.0, 0.0))
    times = tuple(frame / FPS for frame in range(frames))
    return VideoClip(noisy(rng, shown), times, frames / FPS), drawings


def covered_by(drawing: NDArray[np.float32], at: tuple[float, float]) -> tuple[slice, slice]:
    """Returns the rows and columns of a frame that a drawing (height, width) covers, whose left and top
    are shares of the way that it has inside the frame.
    """
    height, width = drawing.shape
    left, top = round(at[0] * (FRAME_SIDE - width)), round(at[1] * (FRAME_SIDE - height))
    return slice(top, top + height), slice(left, left + width)


def paste(
    picture: NDArray[np.uint8], drawing: NDArray[np.float32], color: str, at: tuple[float, float]
) -> None:
    """Draws a thing on a picture (FRAME_SIDE, FRAME_SIDE, 3), in place.

    Args:
        picture: what it is drawn on.
        drawing: opacity of the thing, (height, width).
        color: a key of `COLORS`.
        at: left and top, as for `covered_by`.
    """
    region, alpha = picture[covered_by(drawing, at)], drawing[..., None]
    ink = np.array(COLORS[color], np.float32)
    region[:] = (region * (1 - alpha) + ink * alpha).astype(np.uint8)


def ink_by_token(drawing: NDArray[np.float32], at: tuple[float, float]) -> NDArray[np.float32]:
    """Returns how much of a drawing (height, width) each token of a frame shows, (ACROSS, ACROSS): its
    opacity, summed over the token's pixels. `at` is as for `covered_by`.
    """
    canvas = np.zeros((FRAME_SIDE, FRAME_SIDE), np.float32)
    canvas[covered_by(drawing, at)] = drawing
    # (rows, pixels, columns, pixels)
    ink: NDArray[np.float32] = canvas.reshape(ACROSS, TOKEN_SIDE, ACROSS, TOKEN_SIDE).sum((1, 3))
    return ink


def noisy(rng: np.random.Generator, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Returns pixels of which each has changed by up to `NOISE` levels."""
    noise = rng.integers(-NOISE, NOISE + 1, pixels.shape, np.int8)
    changed: NDArray[np.uint8] = np.clip(pixels.astype(np.int16) + noise, 0, 255).astype(np.uint8)
    return changed


def about_movie(
    ask: Callable[[np.random.Generator], Movie],
) -> Callable[[np.random.Generator, Split], Sample]:
    """Returns a sample maker that shows a new video and asks one question about it."""

    def make(rng: np.random.Generator, split: Split) -> Sample:
        movie = ask(rng)
        turn = Turn(movie.question.text, video=clip_of(rng, split, movie.actors))
        return Sample((turn,), movie.question.answer, movie.question.subset)

    return make
