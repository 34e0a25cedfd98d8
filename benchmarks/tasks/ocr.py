"""Read a handwritten digit or a printed word, as TextVQA asks, https://arxiv.org/abs/1904.08920."""

import numpy as np

from vlm_prune.benchmarks.tasks.base import Question, Task
from vlm_prune.benchmarks.tasks.scenes import Scene, about_scene


def ask(rng: np.random.Generator, scene: Scene) -> Question | None:
    """Returns a question about what is written in a scene; None where nothing is."""
    written = scene.of_kind("digit", "word")
    if not written:
        return None
    thing = written[int(rng.integers(len(written)))]
    return Question(f"What {thing.kind} is {thing.color}?", thing.name, thing.kind)


TASK = Task("ocr", True, about_scene(ask))
