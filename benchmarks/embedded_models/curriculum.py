"""Questions and rows that the embedded model is trained on: the tasks' own question makers, by lesson."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from vlm_prune.benchmarks.embedded_models.language import Lesson, QuestionBlock, Row
from vlm_prune.benchmarks.tasks import attribute, choice, count, exist, ocr, relation, text
from vlm_prune.benchmarks.tasks.base import Question
from vlm_prune.benchmarks.tasks.scenes import (
    COLORS,
    KINDS,
    NAMES,
    PATCH,
    SIDE,
    Scene,
    make_scene,
    noun,
)


def where(rng: np.random.Generator, scene: Scene) -> Question | None:
    """Asks where a thing is, a training-only question; None for a thing near the middle.

    It teaches the model to read places, asked as colors are, so that what finds a thing by its name
    is there already.
    """
    thing = scene.things[int(rng.integers(len(scene.things)))]
    across = bool(rng.random() < 0.5)
    off = (thing.x if across else thing.y) - SIDE / 2
    if abs(off) < 2 * PATCH:
        return None
    axis, (before, after) = ("column", ("left", "right")) if across else ("row", ("above", "below"))
    return Question(f"What {axis} is the {thing.noun}?", before if off < 0 else after, axis)


def what(rng: np.random.Generator, scene: Scene) -> Question:
    """Asks what has a color, a training-only question without the kind of its answer.

    Where the kind is named, any thing of that kind is right so often that the color is not learned.
    """
    thing = scene.things[int(rng.integers(len(scene.things)))]
    return Question(f"What is {thing.color}?", thing.name)


def pair(rng: np.random.Generator, scene: Scene) -> Question:
    """Asks the shortest training-only question: a thing's name asks
    for its color, or the reverse.
    """
    thing = scene.things[int(rng.integers(len(scene.things)))]
    prompt, answer = (thing.name, thing.color) if rng.random() < 0.5 else (thing.color, thing.name)
    return Question(prompt, answer, ONE_WORD[prompt == thing.color])


def name_letter(rng: np.random.Generator, _: Scene | None = None) -> Question:
    """Asks a training-only question about four options alone, one step before `choice`."""
    pool = (tuple(COLORS), *KINDS.values())[int(rng.integers(1 + len(KINDS)))]
    right = str(rng.choice(pool))
    listed, letter = choice.list_options(rng, right, list(pool))
    return Question(f"What letter is {right}? {listed}", letter)


def side(rng: np.random.Generator, scene: Scene) -> Question | None:
    """Asks on which side of another a thing is, a training-only question.

    Its answer grows out of the difference of two places; from there the yes and no of `relation` is
    one step.
    """
    question = relation.ask(rng, scene)
    if question is None:
        return None
    before, after = ("left", "right") if question.subset == "horizontal" else ("above", "below")
    first, second = (before, after) if f" {before} " in question.text else (after, before)
    of = " of" if question.subset == "horizontal" else ""
    both = question.text.replace(f" {first}{of} ", f" {before} or {after}{of} ")
    return Question(both, first if question.answer == "yes" else second)


def listed(rng: np.random.Generator, scene: Scene) -> Question:
    """Asks for all things of a kind in the order of their places, a training-only question.

    Its answer spells out what `count` and `relation` ask for.
    """
    kind = str(rng.choice(list(KINDS)))
    across = bool(rng.random() < 0.5)
    things = sorted(scene.of_kind(kind), key=lambda thing: thing.x if across else thing.y)
    order = "left to right" if across else "top to bottom"
    names = ", ".join(thing.name for thing in things)
    return Question(f"Which {kind}s are there from {order}?", names or "none", kind)


# Each way to ask one of these is a skill of its own, and is reported apart.
COUNTED_BY_SUBSET = ("attribute", "where", "pair")
ONE_WORD = ("named", "colored")
Maker = Callable[[np.random.Generator, Scene], Question | None]
# The harder ones more often, but for a model that sees for the first time ("sight").
LESSONS: dict[Lesson, dict[str, tuple[Maker, int]]] = {
    "lookups": {"attribute": (attribute.ask, 2), "ocr": (ocr.ask, 1), "where": (where, 5)},
    "finding": {
        "attribute": (attribute.ask, 2),
        "ocr": (ocr.ask, 1),
        "what": (what, 3),
        "where": (where, 4),
        "pair": (pair, 4),
    },
    "places": {
        "attribute": (attribute.ask, 1),
        "where": (where, 2),
        "side": (side, 4),
        "relation": (relation.ask, 2),
    },
    "all": {
        "exist": (exist.ask, 1),
        "attribute": (attribute.ask, 1),
        "ocr": (ocr.ask, 1),
        "count": (count.ask, 2),
        "choice": (choice.ask, 3),
        "relation": (relation.ask, 3),
        "where": (where, 1),
        "side": (side, 2),
    },
    "practice": {
        "exist": (exist.ask, 2),
        "attribute": (attribute.ask, 1),
        "ocr": (ocr.ask, 2),
        "count": (count.ask, 6),
        "choice": (choice.ask, 2),
        "relation": (relation.ask, 2),
    },
    "sight": {
        "exist": (exist.ask, 2),
        "attribute": (attribute.ask, 3),
        "ocr": (ocr.ask, 2),
        "count": (count.ask, 2),
        "choice": (choice.ask, 1),
        "relation": (relation.ask, 1),
        "pair": (pair, 4),
    },
    "told": {
        "exist": (exist.ask, 2),
        "attribute": (attribute.ask, 3),
        "ocr": (ocr.ask, 1),
        "count": (count.ask, 2),
        "choice": (choice.ask, 2),
        "pair": (pair, 4),
    },
}


def visual_questions(
    rng: np.random.Generator, scene: Scene, number: int, lesson: Lesson = "all"
) -> list[tuple[str, Question]]:
    """Draws questions about one scene, each with its kind, in the lesson's proportions.

    Args:
        rng: draws kinds and questions.
        scene: what they are about.
        number: how many.
        lesson: a key of `LESSONS`.
    """
    makers = LESSONS[lesson]
    drawn = [kind for kind, (_, share) in makers.items() for _ in range(share)]
    questions: list[tuple[str, Question]] = []
    while len(questions) < number:
        kind = drawn[int(rng.integers(len(drawn)))]
        question = makers[kind][0](rng, scene)
        if question is not None:
            questions.append((question.subset if kind in COUNTED_BY_SUBSET else kind, question))
    return questions


@dataclass(frozen=True)
class ChatFormat:
    """How a chat template writes a conversation.

    Args:
        first: what stands before the first question.
        assistant: between a question and its answer.
        space: before an answer.
        following: between an answer and the next question.
    """

    first: str
    assistant: str
    space: str
    following: str

    @classmethod
    def of(cls, processor: Any) -> "ChatFormat":
        """Reads off what a processor's template writes around messages."""
        spoken = zip(("user", "assistant", "user"), "\0\1\2", strict=True)
        messages = [
            {"role": role, "content": [{"type": "text", "text": text}]} for role, text in spoken
        ]
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        first, turn, following, assistant = re.split("[\0\1\2]", text)
        return cls(first, assistant, turn.removeprefix(assistant), following)

    def before(self, rng: np.random.Generator, turns: int) -> str:
        """Returns what stands before a question: text-only turns with their replies come first."""
        questions = [text.ask(rng) for _ in range(turns)]
        earlier = (
            f"{q.text}{self.assistant}{self.space}{q.answer}{self.following}" for q in questions
        )
        return "".join([self.first, *earlier])

    def block(self, kind: str, question: Question, opening: str = "") -> QuestionBlock:
        """Writes a question and its answer; single words stand alone.

        Args:
            kind: under which training reports it.
            question: with its answer.
            opening: text before the question.
        """
        if kind in ONE_WORD:
            return QuestionBlock(f" {question.text}", f" {question.answer}", kind)
        prompt = f"{opening}{question.text}{self.assistant}"
        return QuestionBlock(prompt, f"{self.space}{question.answer}", kind)

    def text_row(self, before: str, questions: Sequence[tuple[str, Question]]) -> Row:
        """Makes a row of questions without an image, tokenized as the whole text is.

        Args:
            before: what stands before each; a space at its end is a part of the next word.
            questions: each with its kind.
        """
        prefix = before.rstrip(" ")
        opening = before[len(prefix) :]
        return Row(prefix, [self.block(kind, question, opening) for kind, question in questions])


TINY_FORMAT = ChatFormat("<s>USER: ", " ASSISTANT:", " ", "</s>USER: ")


def text_row(rng: np.random.Generator, number: int, chat: ChatFormat = TINY_FORMAT) -> Row:
    """Makes a row of text-only questions, after up to two earlier turns.

    Args:
        rng: draws turns and questions.
        number: of questions.
        chat: how they are written.
    """
    before = chat.before(rng, int(rng.integers(0, 3)) if rng.random() < 0.5 else 0)
    questions = [text.ask(rng) for _ in range(number)]
    return chat.text_row(before, [(q.subset, q) for q in questions])


def story_row(rng: np.random.Generator, number: int) -> Row:
    """Makes a row of questions about one scene in words: plain, with four
    options, and about options alone.
    """
    story, names, colors = text.facts(rng, int(rng.integers(2, 5)), alike=rng.random() < 0.5)
    questions: list[tuple[str, Question]] = []
    for _ in range(number):
        k = int(rng.integers(len(names)))
        name, color = names[k], colors[k]
        kind = next(kind for kind, pool in KINDS.items() if name in pool)
        drawn = rng.random()
        if drawn < 0.3:
            questions.append(("told", Question(f"What color is the {noun(name)}?", color)))
        elif drawn < 0.5:
            questions.append(("letter", name_letter(rng)))
        else:
            questions.append(("option", choice.ask_about(rng, kind, name, color)))
    return TINY_FORMAT.text_row(f"{TINY_FORMAT.first}{story} ", questions)


def recite_row(rng: np.random.Generator, number: int) -> Row:
    """Makes a row of words to repeat: what comes after a word is said again after it.

    It is the step before looking a thing's color up by its name.
    """
    words = [*NAMES, *COLORS, *choice.LETTERS]
    lists = [rng.choice(words, int(rng.integers(3, 9)), replace=False) for _ in range(number)]
    questions = [Question(f"Repeat {' '.join(spoken)}.", " ".join(spoken)) for spoken in lists]
    return TINY_FORMAT.text_row(TINY_FORMAT.first, [("recite", question) for question in questions])


def described_scene_row(rng: np.random.Generator, number: int) -> Row:
    """Makes a row of questions about a scene as they are asked about images,
    but the scene is told in words.
    """
    scene = make_scene(rng, "train")
    facts = [f"The {thing.noun} is {thing.color}." for thing in scene.things]
    questions = visual_questions(rng, scene, number, "told")
    story = " ".join(rng.permutation(facts))
    return TINY_FORMAT.text_row(f"{TINY_FORMAT.first}{story} ", questions)


def visual_row(
    rng: np.random.Generator, scene: Scene, image: Tensor, number: int, lesson: Lesson,
    chat: ChatFormat = TINY_FORMAT,
) -> Row:  # fmt: skip
    """Makes a row of questions about one image, in one case out of five after text-only turns.

    Args:
        rng: draws turns and questions.
        scene: what the image shows.
        image: (tokens, width) tower features, or (tokens, 3) symbols.
        number: of questions.
        lesson: a key of `LESSONS`.
        chat: how they are written.
    """
    before = chat.before(rng, int(rng.integers(1, 3)) if rng.random() < 0.2 else 0)
    questions = visual_questions(rng, scene, number, lesson)
    return Row(before, [chat.block(kind, q) for kind, q in questions], image)
