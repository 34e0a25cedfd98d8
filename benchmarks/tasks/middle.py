"""Video: which word is written in the middle of it?"""

from itertools import pairwise

import numpy as np

from vlm_prune.benchmarks.tasks.base import Question, Task
from vlm_prune.benchmarks.tasks.moving import FRAMES, Movie, about_movie, still_things


def ask(rng: np.random.Generator) -> Movie:
    """Returns three words, one after the other; the second is asked for."""
    bounds = [0, *sorted(int(rng.integers(low, low + 3)) for low in (4, 10)), FRAMES]
    actors = still_things(rng, list(pairwise(bounds)), kind="word")
    question = "Which word is written in the middle of the video?"
    return Movie(actors, Question(question, actors[1].name))


TASK = Task("middle", True, about_movie(ask))
