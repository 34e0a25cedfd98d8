"""How many things of a kind do six images show together?"""

import numpy as np

from vlm_prune.benchmarks.tasks.album import about_album
from vlm_prune.benchmarks.tasks.base import Question, Task
from vlm_prune.benchmarks.tasks.scenes import Scene


def ask(rng: np.random.Generator, scenes: list[Scene]) -> Question:
    """Returns a question about how many digits or words all scenes have together."""
    kind = str(rng.choice(["digit", "word"]))
    count = sum(len(scene.of_kind(kind)) for scene in scenes)
    return Question(f"How many {kind}s are there?", str(count), kind)


TASK = Task("tally", True, about_album(ask))
