"""How many objects of a kind are there?"""

import numpy as np

from vlm_prune.benchmarks.tasks.base import Question, Task
from vlm_prune.benchmarks.tasks.scenes import KINDS, Scene, about_scene


def ask(rng: np.random.Generator, scene: Scene) -> Question:
    """Returns a question about how many things of one kind a scene has."""
    kind = str(rng.choice(list(KINDS)))
    return Question(f"How many {kind}s are there?", str(len(scene.of_kind(kind))), kind)


TASK = Task("count", True, about_scene(ask))
