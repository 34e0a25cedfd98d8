"""Video: which word is written in the middle of it?"""

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
    """Returns three words, one after the other; the second is asked for."""
    bounds = [0, *sorted(int(rng.integers(low, low + 3)) for low in (4, 10)), FRAMES]
    actors = tuple(
        Actor(*thing, standing(at, FRAMES, bounds[turn], bounds[turn + 1]))
        for turn, (thing, at) in enumerate(zip(cast(rng, 3, "word"), spots(rng, 3), strict=True))
    )
    question = "Which word is written in the middle of the video?"
    return Movie(actors, Question(question, actors[1].name))


TASK = Task("middle", True, about_movie(ask))
