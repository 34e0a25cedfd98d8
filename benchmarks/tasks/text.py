"""Text-only skills: arithmetic, comparison, ordering, and lookup in a written scene."""

import numpy as np

from vlm_prune.benchmarks.tasks.base import Question, Sample, Split, Task, Turn
from vlm_prune.benchmarks.tasks.scenes import COLORS, KINDS, NAMES, noun


def arithmetic(rng: np.random.Generator) -> Question:
    """Returns a question about a sum or a difference of two digits."""
    a, b = (int(v) for v in rng.integers(0, 10, 2))
    if rng.random() < 0.5:
        return Question(f"What is {a} plus {b}?", str(a + b), "arithmetic")
    return Question(f"What is {a + b} minus {b}?", str(a), "arithmetic")


def comparison(rng: np.random.Generator) -> Question:
    """Returns a question about which of two numbers is larger."""
    a, b = (int(v) for v in rng.choice(10, 2, replace=False))
    word, answer = ("larger", max(a, b)) if rng.random() < 0.5 else ("smaller", min(a, b))
    return Question(f"Which is {word}, {a} or {b}?", str(answer), "comparison")


def ordering(rng: np.random.Generator) -> Question:
    """Returns a question about the order of three numbers."""
    values = [int(v) for v in rng.choice(10, 3, replace=False)]
    listed = " ".join(map(str, values))
    return Question(f"Sort {listed}.", " ".join(map(str, sorted(values))), "ordering")


def facts(
    rng: np.random.Generator, number: int = 3, alike: bool = False
) -> tuple[str, list[str], list[str]]:
    """Returns a scene in words: the story, and the names and colors of its things.

    Args:
        rng: draws them.
        number: of things.
        alike: whether all are of one kind, so that only their very names tell them apart.
    """
    pool = list(KINDS.values())[int(rng.integers(len(KINDS)))] if alike else NAMES
    names = [str(n) for n in rng.choice(pool, number, replace=False)]
    colors = [str(c) for c in rng.choice(list(COLORS), number, replace=False)]
    story = " ".join(f"The {noun(n)} is {c}." for n, c in zip(names, colors, strict=True))
    return story, names, colors


def lookup(rng: np.random.Generator) -> Question:
    """Returns a question about one thing of a scene in words."""
    story, names, colors = facts(rng)
    index = int(rng.integers(len(names)))
    return Question(f"{story} What color is the {noun(names[index])}?", colors[index], "lookup")


def ask(rng: np.random.Generator) -> Question:
    """Returns a question of one of the four kinds."""
    makers = (arithmetic, comparison, ordering, lookup)
    return makers[int(rng.integers(len(makers)))](rng)


def _make(rng: np.random.Generator, split: Split) -> Sample:
    question = ask(rng)
    return Sample((Turn(question.text),), question.answer, question.subset)


TASK = Task("text", False, _make)
