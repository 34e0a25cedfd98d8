"""Video: what is seen in one of 64 frames alone?"""

import numpy as np

from vlm_prune.benchmarks.tasks.base import Question, Task
from vlm_prune.benchmarks.tasks.moving import Movie, about_movie, still_things

LONG = 64


def ask(rng: np.random.Generator) -> Movie:
    """Returns three shapes, of which the last is there for one frame."""
    moment = int(rng.integers(2, LONG - 2))
    times = [(0, LONG), (0, LONG), (moment, moment + 1)]
    actors = still_things(rng, times, LONG)
    return Movie(actors, Question("Which object appears for a moment?", actors[2].name))


TASK = Task("event", True, about_movie(ask))
