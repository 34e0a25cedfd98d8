"""Video: does one event come before another?"""

from collections.abc import Sequence

import numpy as np

from vlm_prune.benchmarks.tasks.base import Question, Task
from vlm_prune.benchmarks.tasks.moving import FRAMES, Actor, Movie, about_movie, still_things


def ask(rng: np.random.Generator) -> Movie:
    """Returns two shapes that are seen for two frames each, and whether one is the earlier."""
    actors = still_things(rng, sightings(rng, 2))
    one, other = rng.permutation(2).tolist()
    return Movie(actors, about_order(actors, one, other))


def sightings(rng: np.random.Generator, count: int) -> list[tuple[int, int]]:
    """Returns for two frames each when `count` shapes are seen, the earliest first."""
    times = sorted(rng.permutation(range(1, FRAMES - 2, 3))[:count].tolist())
    return [(time, time + 2) for time in times]


def about_order(actors: Sequence[Actor], one: int, other: int) -> Question:
    """Returns the question whether one shape appears before another.

    Args:
        actors: in their order.
        one: number of the shape that is asked about.
        other: number of the one that it is compared with.
    """
    text = f"Does the {actors[one].name} appear before the {actors[other].name}?"
    return Question(text, "yes" if one < other else "no")


TASK = Task("order", True, about_movie(ask))
