"""Video: in which direction does something move?"""

import numpy as np

from vlm_prune.benchmarks.tasks.base import Question, Task
from vlm_prune.benchmarks.tasks.moving import FRAMES, Actor, Movie, about_movie, cast

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


def ask(rng: np.random.Generator) -> Movie:
    """Returns two shapes that move in different directions, and which one is asked for."""
    things, ways = cast(rng, 2), rng.permutation(list(DIRECTIONS))[:2]
    actors = []
    for (kind, name, color), way in zip(things, ways, strict=True):
        (across, down), lane = DIRECTIONS[str(way)], float(rng.uniform(0.1, 0.9))
        # from one side to the other along its own lane
        steps = [(0.05 + 0.9 * frame / (FRAMES - 1)) for frame in range(FRAMES)]
        along = [step if across + down > 0 else 1 - step for step in steps]
        path = tuple((at, lane) if across else (lane, at) for at in along)
        actors.append(Actor(kind, name, color, path))
    chosen = int(rng.integers(2))
    question = f"In which direction does the {actors[chosen].name} move?"
    return Movie(tuple(actors), Question(question, str(ways[chosen]), str(ways[chosen])))


TASK = Task("direction", True, about_movie(ask))
