"""Video: how many times does something pass?"""

import numpy as np

from vlm_prune.benchmarks.tasks.base import Question, Task
from vlm_prune.benchmarks.tasks.moving import FRAMES, Actor, Movie, about_movie, cast

MOST, TURN = 4, 4  # passes at most, and frames of each turn, of which the last shows nothing


def ask(rng: np.random.Generator) -> Movie:
    """Returns a shape that crosses the picture some times at different heights, and is counted."""
    times = int(rng.integers(1, MOST + 1))
    path: list[tuple[float, float] | None] = [None] * FRAMES
    for turn in sorted(rng.permutation(FRAMES // TURN)[:times].tolist()):
        height = float(rng.uniform(0.1, 0.9))
        for step in range(TURN - 1):
            path[TURN * turn + step] = (0.1 + 0.4 * step, height)
    ((kind, name, color),) = cast(rng, 1)
    question = Question(f"How many times does the {name} pass?", str(times), str(times))
    return Movie((Actor(kind, name, color, tuple(path)),), question)


TASK = Task("passes", True, about_movie(ask))
