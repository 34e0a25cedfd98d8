"""Video: does one event come before another?"""

import numpy as np

from vlm_prune.benchmarks.tasks.base import Question, Task
from vlm_prune.benchmarks.tasks.moving import (
    FRAMES,
    Actor,
    Movie,
    about_movie,
    cast,
    spots,
    standing,
)


def ask(rng: np.random.Generator) -> Movie:
    """Returns two shapes that are seen for two frames each, and whether one is the earlier."""
    times = sorted(rng.permutation(range(1, FRAMES - 2, 3))[:2].tolist())
    actors = tuple(
        Actor(*thing, standing(at, FRAMES, time, time + 2))
        for thing, at, time in zip(cast(rng, 2), spots(rng, 2), times, strict=True)
    )
    one, other = rng.permutation(2).tolist()
    question = f"Does the {actors[one].name} appear before the {actors[other].name}?"
    return Movie(actors, Question(question, "yes" if one < other else "no"))


TASK = Task("order", True, about_movie(ask))
