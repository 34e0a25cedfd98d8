"""Four options, answered by letter, as MMBench asks, https://arxiv.org/abs/2307.06281."""

import numpy as np

from vlm_prune.benchmarks.tasks.base import Question, Task, about_scene
from vlm_prune.benchmarks.tasks.scenes import COLORS, KINDS, Scene

LETTERS = "ABCD"


def options(rng: np.random.Generator, right: str, others: list[str]) -> tuple[str, str]:
    """Four lettered options in random order, and the letter of the right one."""
    wrong = [str(w) for w in rng.choice([o for o in others if o != right], 3, replace=False)]
    place = int(rng.integers(4))
    shown = [*wrong[:place], right, *wrong[place:]]
    text = " ".join(f"{letter}. {option}" for letter, option in zip(LETTERS, shown, strict=True))
    return text, LETTERS[place]


def ask(rng: np.random.Generator, scene: Scene) -> Question:
    thing = scene.things[int(rng.integers(len(scene.things)))]
    if rng.random() < 0.5:
        text, letter = options(rng, thing.color, list(COLORS))
        return Question(f"What color is the {thing.noun}? {text}", letter, "color")
    text, letter = options(rng, thing.name, list(KINDS[thing.kind]))
    return Question(f"What {thing.kind} is {thing.color}? {text}", letter, thing.kind)


TASK = Task("choice", True, about_scene(ask))
