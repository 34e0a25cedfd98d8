"""What is named that is not there: descriptions scored as CHAIR does, and questions as POPE asks.

CHAIR, https://arxiv.org/abs/1809.02156, is the share of the objects named in a free description that
are not in the image; a description's score is the share that is. POPE,
https://arxiv.org/abs/2305.10355, asks whether an object is there, and half are not.
"""

import numpy as np

from vlm_prune.benchmarks.tasks import exist
from vlm_prune.benchmarks.tasks.base import Question, Task
from vlm_prune.benchmarks.tasks.scenes import COLORS, NAMES, Scene, about_scene
from vlm_prune.benchmarks.tasks.vqa import exact_match, normalize

DESCRIBE = "Describe the image."
KIND_WORDS = ("digit", "word")


def describe(rng: np.random.Generator, scene: Scene) -> Question:
    """Returns the request to describe a scene, answered by its things from top to bottom."""
    things = sorted(scene.things, key=lambda thing: thing.y)
    named = ", ".join(f"{thing.color} {thing.noun}" for thing in things)
    return Question(DESCRIBE, named, "describe")


def ask(rng: np.random.Generator, scene: Scene) -> Question:
    """Returns the request to describe a scene, or as often a question of `exist`."""
    if rng.random() < 0.5:
        return describe(rng, scene)
    question = exist.ask(rng, scene)
    return Question(question.text, question.answer, f"exist, {question.subset}")


def named_things(description: str) -> list[tuple[str, str]]:
    """Returns name and color of each thing that a description names, in order.

    A color belongs to the next name, with nothing between them but what kind of thing it is; a thing
    without one has the color "".
    """
    found, color = [], ""
    for word in normalize(description).split():
        if word in NAMES:
            found.append((word, color))
        if word not in KIND_WORDS:
            color = word if word in COLORS else ""
    return found


def score(prediction: str, answer: str) -> float:
    """Returns the share of the named things that are there, 0.0 if none is named; 1.0 or 0.0 for yes
    and no.

    Args:
        prediction: of the model.
        answer: yes, no, or a description of all things; one that is named with another color than its
            own is not there.
    """
    if answer in ("yes", "no"):
        return exact_match(prediction, answer)
    present, named = named_things(answer), named_things(prediction)
    names = {name for name, _ in present}
    right = [thing in present if thing[1] else thing[0] in names for thing in named]
    return sum(right) / len(right) if right else 0.0


TASK = Task("hallucination", True, about_scene(ask), score, new_tokens=48)
