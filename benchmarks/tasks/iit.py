"""Interleaved image-text conversations in six settings, scored on the last turn.

The settings are those of the IIT benchmark of Wings (https://arxiv.org/abs/2406.03496): T is a
text-only turn, V a turn with an image. Replies of earlier turns are the gold ones, so that the
last turn is measured alone.
"""

import numpy as np

from vlm_prune.benchmarks.tasks import attribute, count, exist, ocr, text
from vlm_prune.benchmarks.tasks.base import Question, Sample, Split, Task, Turn
from vlm_prune.benchmarks.tasks.scenes import Scene, make_scene

SETTINGS = ("T", "T,T", "T,T,T", "T,T,V", "T,V", "V")


def ask_about_scene(rng: np.random.Generator, scene: Scene) -> Question:
    """Asks a question of one of the tasks that a visual turn may ask."""
    makers = (attribute.ask, count.ask, exist.ask, ocr.ask)
    return makers[int(rng.integers(len(makers)))](rng, scene) or exist.ask(rng, scene)


def _turn(rng: np.random.Generator, split: Split, visual: bool) -> tuple[Turn, str]:
    if not visual:
        question = text.ask(rng)
        return Turn(question.text), question.answer
    scene = make_scene(rng, split)
    question = ask_about_scene(rng, scene)
    return Turn(question.text, (scene.image,)), question.answer


def make(rng: np.random.Generator, split: Split) -> Sample:
    """Returns a conversation of text and visual questions."""
    setting = SETTINGS[int(rng.integers(len(SETTINGS)))]
    turns, answer = [], ""
    for kind in setting.split(","):
        turn, answer = _turn(rng, split, kind == "V")
        turns.append(Turn(turn.text, turn.images, answer))
    last = turns[-1]
    return Sample((*turns[:-1], Turn(last.text, last.images)), answer, setting)


TASK = Task("iit", True, make)
