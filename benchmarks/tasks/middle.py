"""Video: which word is written in the middle of it?"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from vlm_prune.benchmarks.tasks.base import Question, Task
from vlm_prune.benchmarks.tasks.moving import FRAMES, Actor, Movie, about_movie, still_things


def ask(rng: np.random.Generator) -> Movie:
    """Returns three words, one after the other; the second is asked for."""
    actors = still_things(rng, thirds(rng), kind="word")
    return Movie(actors, about_middle(actors))


def thirds(rng: np.random.Generator) -> list[tuple[int, int]]:
    """Returns when each of three words is seen, one after the other, and the second in the middle."""
    return list(pairwise([0, *(int(rng.integers(low, low + 3)) for low in (4, 10)), FRAMES]))


def about_middle(actors: Sequence[Actor]) -> Question:
    """Returns the question about the second of `actors`."""
    return Question("Which word is written in the middle of the video?", actors[1].name)


TASK = Task("middle", True, about_movie(ask))
