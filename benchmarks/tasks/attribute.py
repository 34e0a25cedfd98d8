"""Color of a thing, shape of a color: GQA's attribute questions, https://arxiv.org/abs/1902.09506."""

import numpy as np

from vlm_prune.benchmarks.tasks.base import Question, Task
from vlm_prune.benchmarks.tasks.scenes import Scene, about_scene


def ask(rng: np.random.Generator, scene: Scene) -> Question:
    """Returns a question about the color of one thing of a scene."""
    shapes = scene.of_kind("shape")
    if shapes and rng.random() < 0.5:
        thing = shapes[int(rng.integers(len(shapes)))]
        return Question(f"What shape is {thing.color}?", thing.name, "shape")
    thing = scene.things[int(rng.integers(len(scene.things)))]
    return Question(f"What color is the {thing.noun}?", thing.color, "color")


TASK = Task("attribute", True, about_scene(ask))
