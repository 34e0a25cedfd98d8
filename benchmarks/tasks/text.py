"""Text-only skills: arithmetic, comparison, ordering, and lookup in a written scene."""

from dataclasses import replace

import numpy as np

from vlm_prune.benchmarks.tasks.base import Question, Sample, Split, Task, Turn
from vlm_prune.benchmarks.tasks.scenes import COLORS, NAMES, noun


def arithmetic(rng: np.random.Generator) -> Question:
    a, b = (int(v) for v in rng.integers(0, 10, 2))
    if rng.random() < 0.5:
        return Question(f"What is {a} plus {b}?", str(a + b), "arithmetic")
    return Question(f"What is {a + b} minus {b}?", str(a), "arithmetic")


def comparison(rng: np.random.Generator) -> Question:
    a, b = (int(v) for v in rng.choice(10, 2, replace=False))
    word, answer = ("larger", max(a, b)) if rng.random() < 0.5 else ("smaller", min(a, b))
    return Question(f"Which is {word}, {a} or {b}?", str(answer), "comparison")


def ordering(rng: np.random.Generator) -> Question:
    values = [int(v) for v in rng.choice(10, 3, replace=False)]
    listed = " ".join(map(str, values))
    return Question(f"Sort {listed}.", " ".join(map(str, sorted(values))), "ordering")


def story(rng: np.random.Generator, facts: int) -> tuple[str, list[Question]]:
    """Facts about things of different colours, and a question about each, in order."""
    names = [str(n) for n in rng.choice(NAMES, facts, replace=False)]
    colors = [str(c) for c in rng.choice(list(COLORS), facts, replace=False)]
    told = " ".join(f"The {noun(n)} is {c}." for n, c in zip(names, colors, strict=True))
    asked = [
        Question(f"What color is the {noun(name)}?", color, "lookup")
        for name, color in zip(names, colors, strict=True)
    ]
    return told, asked


def lookup(rng: np.random.Generator) -> Question:
    told, asked = story(rng, 3)
    question = asked[int(rng.integers(3))]
    return replace(question, text=f"{told} {question.text}")


def ask(rng: np.random.Generator) -> Question:
    makers = (arithmetic, comparison, ordering, lookup)
    return makers[int(rng.integers(len(makers)))](rng)


def _make(rng: np.random.Generator, split: Split) -> Sample:
    question = ask(rng)
    return Sample((Turn(question.text),), question.answer, question.subset)


TASK = Task("text", False, _make)
