"""Of six images one alone shows the thing that is asked for: what color is it?"""

from collections import Counter

import numpy as np

from vlm_prune.benchmarks.tasks.album import about_album
from vlm_prune.benchmarks.tasks.base import Question, Task
from vlm_prune.benchmarks.tasks.scenes import Scene


def ask(rng: np.random.Generator, scenes: list[Scene]) -> Question | None:
    """Returns a question about the color of a thing that no other scene shows; None where there is none."""
    names = Counter(thing.name for scene in scenes for thing in scene.things)
    alone = [
        (number, thing)
        for number, scene in enumerate(scenes)
        for thing in scene.things
        if names[thing.name] == 1
    ]
    if not alone:
        return None
    number, thing = alone[int(rng.integers(len(alone)))]
    return Question(f"What color is the {thing.noun}?", thing.color, f"image {number + 1}")


TASK = Task("needle", True, about_album(ask))
