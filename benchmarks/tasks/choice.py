"""Four options, answered by letter, as MMBench asks, https://arxiv.org/abs/2307.06281."""

import numpy as np

from vlm_prune.benchmarks.tasks.base import Question, Task
from vlm_prune.benchmarks.tasks.scenes import COLORS, KINDS, Scene, about_scene, noun

LETTERS = "ABCD"


def list_options(rng: np.random.Generator, right: str, others: list[str]) -> tuple[str, str]:
    """Returns four lettered options in random order, and the letter of the right one.

    Args:
        rng: draws the order and the wrong ones.
        right: the right answer.
        others: wrong answers to draw from.
    """
    wrong = [str(w) for w in rng.choice([o for o in others if o != right], 3, replace=False)]
    position = int(rng.integers(4))
    shown = [*wrong[:position], right, *wrong[position:]]
    text = " ".join(f"{letter}. {option}" for letter, option in zip(LETTERS, shown, strict=True))
    return text, LETTERS[position]


def ask_about(rng: np.random.Generator, kind: str, name: str, color: str) -> Question:
    """Returns a question about one thing: its color by its name, or its name by its color.

    Args:
        rng: decides which, and the wrong options.
        kind: of the thing.
        name: of the thing.
        color: of the thing.
    """
    if rng.random() < 0.5:
        text, letter = list_options(rng, color, list(COLORS))
        return Question(f"What color is the {noun(name)}? {text}", letter, "color")
    text, letter = list_options(rng, name, list(KINDS[kind]))
    return Question(f"What {kind} is {color}? {text}", letter, kind)


def ask(rng: np.random.Generator, scene: Scene) -> Question:
    """Returns a question with four options about one thing of a scene."""
    thing = scene.things[int(rng.integers(len(scene.things)))]
    return ask_about(rng, thing.kind, thing.name, thing.color)


TASK = Task("choice", True, about_scene(ask))
