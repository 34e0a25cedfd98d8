"""Video: which object appears first, or last?"""

import numpy as np

from vlm_prune.benchmarks.tasks.base import Question, Task
from vlm_prune.benchmarks.tasks.moving import FRAMES, Movie, about_movie, still_things


def ask(rng: np.random.Generator) -> Movie:
    """Returns three shapes that appear one after the other and stay, and which is asked for."""
    starts = [int(rng.integers(1 + 5 * turn, 5 + 5 * turn)) for turn in range(3)]
    actors = still_things(rng, [(start, FRAMES) for start in starts])
    which = str(rng.choice(["first", "last"]))
    name = actors[0 if which == "first" else -1].name
    return Movie(actors, Question(f"Which object appears {which}?", name, which))


TASK = Task("appears", True, about_movie(ask))
