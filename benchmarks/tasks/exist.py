"""Is it there? Yes/no questions sampled as POPE does, https://arxiv.org/abs/2305.10355."""

import numpy as np

from vlm_prune.benchmarks.tasks.base import Question, Task
from vlm_prune.benchmarks.tasks.scenes import COLORS, NAMES, SHAPES, Scene, about_scene, noun


def ask(rng: np.random.Generator, scene: Scene) -> Question:
    """Asks whether a thing of a color is there: half yes.

    The no-questions name a random, a popular (shapes) or an adversarial absentee.

    Adversarial: thing and color are both in the scene, but on different objects.
    """
    subset = str(rng.choice(["random", "popular", "adversarial"]))
    if rng.random() < 0.5:
        pool = scene.of_kind("shape") if subset == "popular" else list(scene.things)
        pool = pool or list(scene.things)
        thing = pool[int(rng.integers(len(pool)))]
        return Question(f"Is there a {thing.color} {thing.noun}?", "yes", subset)
    if subset == "adversarial" and len(scene.things) > 1:
        first, second = rng.choice(len(scene.things), 2, replace=False)
        color, named = scene.things[int(first)].color, scene.things[int(second)].noun
        return Question(f"Is there a {color} {named}?", "no", subset)
    present = {thing.name for thing in scene.things}
    names = [name for name in (SHAPES if subset == "popular" else NAMES) if name not in present]
    name = str(rng.choice(names or [n for n in NAMES if n not in present]))
    return Question(f"Is there a {rng.choice(list(COLORS))} {noun(name)}?", "no", subset)


TASK = Task("exist", True, about_scene(ask))
