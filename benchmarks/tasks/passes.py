"""Video: how many times does something pass?"""

from collections.abc import Sequence

import numpy as np

from vlm_prune.benchmarks.tasks.base import Question, Task
from vlm_prune.benchmarks.tasks.moving import FRAMES, Actor, Movie, about_movie, cast

MOST, TURN = 4, 4  # passes at most, and frames of each turn, of which the last shows nothing


def ask(rng: np.random.Generator) -> Movie:
    """Returns a shape that crosses the picture some times at different heights, and is counted."""
    path = crossings(rng, rng.uniform(0.1, 0.9, MOST).tolist())
    ((kind, name, color),) = cast(rng, 1)
    actor = Actor(kind, name, color, path)
    return Movie((actor,), about_passes(actor))


def crossings(
    rng: np.random.Generator, heights: Sequence[float]
) -> tuple[tuple[float, float] | None, ...]:
    """Returns the path of what crosses the picture in some of four turns, at the turns' heights."""
    path: list[tuple[float, float] | None] = [None] * FRAMES
    for turn in rng.permutation(FRAMES // TURN)[: int(rng.integers(1, MOST + 1))].tolist():
        for step in range(TURN - 1):
            path[TURN * turn + step] = (0.1 + 0.4 * step, heights[turn])
    return tuple(path)


def about_passes(actor: Actor) -> Question:
    """Returns the question how often a shape crosses the picture."""
    times = str(len(actor.seen) // (TURN - 1))
    return Question(f"How many times does the {actor.name} pass?", times, times)


TASK = Task("passes", True, about_movie(ask))
