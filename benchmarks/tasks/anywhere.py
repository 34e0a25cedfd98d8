"""Does any of six images show a thing? A no needs all of them."""

import numpy as np

from vlm_prune.benchmarks.tasks.album import about_album
from vlm_prune.benchmarks.tasks.base import Question, Task
from vlm_prune.benchmarks.tasks.scenes import NAMES, Scene, noun


def ask(rng: np.random.Generator, scenes: list[Scene]) -> Question:
    """Returns a question whether a thing is there; it is in one scene at least, or in none."""
    shown = {thing.name for scene in scenes for thing in scene.things}
    there = bool(rng.random() < 0.5)
    name = str(rng.choice([name for name in NAMES if (name in shown) is there]))
    answer = "yes" if there else "no"
    return Question(f"Is there a {noun(name)}?", answer, answer)


TASK = Task("anywhere", True, about_album(ask))
