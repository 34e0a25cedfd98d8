"""Video: which object appears first, or last?"""

from collections.abc import Sequence

import numpy as np

from vlm_prune.benchmarks.tasks.base import Question, Task
from vlm_prune.benchmarks.tasks.moving import FRAMES, Actor, Movie, about_movie, still_things


def ask(rng: np.random.Generator) -> Movie:
    """Returns three shapes that appear one after the other and stay, and which is asked for."""
    actors = still_things(rng, appearances(rng))
    return Movie(actors, about_turn(actors, str(rng.choice(["first", "last"]))))


def appearances(rng: np.random.Generator) -> list[tuple[int, int]]:
    """Returns when each of three shapes is seen, the earliest first: its first frame and the end."""
    return [(int(rng.integers(1 + 5 * turn, 5 + 5 * turn)), FRAMES) for turn in range(3)]


def about_turn(actors: Sequence[Actor], which: str) -> Question:
    """Returns the question which of `actors`, in their order, is first, or last."""
    name = actors[0 if which == "first" else -1].name
    return Question(f"Which object appears {which}?", name, which)


TASK = Task("appears", True, about_movie(ask))
