"""Which of two objects is further left, right, up or down? Answered with yes or no."""

import numpy as np

from vlm_prune.benchmarks.tasks.base import Question, Task
from vlm_prune.benchmarks.tasks.scenes import Scene, about_scene

CLEAR_MARGIN = 56.0


def ask(rng: np.random.Generator, scene: Scene) -> Question | None:
    """Asks how two objects stand to each other on the chosen axis.

    None when no two objects are at least 56 px (4 patches) apart on it.
    """
    horizontal = bool(rng.random() < 0.5)
    coordinates = [thing.x if horizontal else thing.y for thing in scene.things]
    pairs = [
        (a, b)
        for a in range(len(coordinates))
        for b in range(len(coordinates))
        if coordinates[b] - coordinates[a] >= CLEAR_MARGIN
    ]
    if not pairs:
        return None
    first, second = (scene.things[i] for i in pairs[int(rng.integers(len(pairs)))])
    before, after = ("left of", "right of") if horizontal else ("above", "below")
    if rng.random() < 0.5:
        first, second, before, after = second, first, after, before
    true = bool(rng.random() < 0.5)
    relation = before if true else after
    text = f"Is the {first.noun} {relation} the {second.noun}?"
    return Question(text, "yes" if true else "no", "horizontal" if horizontal else "vertical")


TASK = Task("relation", True, about_scene(ask))
