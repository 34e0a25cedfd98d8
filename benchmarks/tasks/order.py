"""Video: does one event come before another?"""

import numpy as np

from vlm_prune.benchmarks.tasks.base import Question, Task
from vlm_prune.benchmarks.tasks.moving import FRAMES, Movie, about_movie, still_things


def ask(rng: np.random.Generator) -> Movie:
    """Returns two shapes that are seen for two frames each, and whether one is the earlier."""
    times = sorted(rng.permutation(range(1, FRAMES - 2, 3))[:2].tolist())
    actors = still_things(rng, [(time, time + 2) for time in times])
    one, other = rng.permutation(2).tolist()
    question = f"Does the {actors[one].name} appear before the {actors[other].name}?"
    return Movie(actors, Question(question, "yes" if one < other else "no"))


TASK = Task("order", True, about_movie(ask))
