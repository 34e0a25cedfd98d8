"""Video: what is seen in one of 64 frames alone?"""

from collections.abc import Sequence

import numpy as np

from vlm_prune.benchmarks.tasks.base import Question, Task
from vlm_prune.benchmarks.tasks.moving import Actor, Movie, about_movie, still_things

LONG = 64


def ask(rng: np.random.Generator) -> Movie:
    """Returns three shapes, of which the last is there for one frame."""
    actors = still_things(rng, moments(rng, LONG), LONG)
    return Movie(actors, about_moment(actors))


def moments(rng: np.random.Generator, frames: int) -> list[tuple[int, int]]:
    """Returns when each of three shapes is seen in `frames` frames, the last one in one of them."""
    moment = int(rng.integers(2, frames - 2))
    return [(0, frames), (0, frames), (moment, moment + 1)]


def about_moment(actors: Sequence[Actor]) -> Question:
    """Returns the question about the last of `actors`."""
    return Question("Which object appears for a moment?", actors[2].name)


TASK = Task("event", True, about_movie(ask))
