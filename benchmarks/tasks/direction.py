"""Video: in which direction does something move?"""

import numpy as np

from vlm_prune.benchmarks.tasks.base import Question, Task
from vlm_prune.benchmarks.tasks.moving import FRAMES, Actor, Movie, about_movie, cast

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


def ask(rng: np.random.Generator) -> Movie:
    """Returns two shapes that move in different directions, and which one is asked for."""
    things, ways = cast(rng, 2), rng.permutation(list(DIRECTIONS))[:2]
    actors = tuple(
        Actor(*thing, lane(str(way), float(rng.uniform(0.1, 0.9))))
        for thing, way in zip(things, ways, strict=True)
    )
    return Movie(actors, about_direction(actors[int(rng.integers(2))]))


def lane(way: str, at: float) -> tuple[tuple[float, float], ...]:
    """Returns the path from one side of the picture to the other.

    Args:
        way: a key of `DIRECTIONS`.
        at: how far from the top, or from the left, the path lies.
    """
    across, down = DIRECTIONS[way]
    steps = [(0.05 + 0.9 * frame / (FRAMES - 1)) for frame in range(FRAMES)]
    along = [step if across + down > 0 else 1 - step for step in steps]
    return tuple((step, at) if across else (at, step) for step in along)


def about_direction(actor: Actor) -> Question:
    """Returns the question in which direction a shape moves."""
    (left, top), (right, bottom) = actor.path[0] or (0.0, 0.0), actor.path[-1] or (0.0, 0.0)
    moved = (np.sign(round(right - left, 6)), np.sign(round(bottom - top, 6)))
    way = next(way for way, step in DIRECTIONS.items() if step == moved)
    return Question(f"In which direction does the {actor.name} move?", way, way)


TASK = Task("direction", True, about_movie(ask))
