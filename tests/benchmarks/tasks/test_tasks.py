"""The embedded tasks: same arguments, same sample; splits that share nothing; answers one can trust."""

import re
from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from vlm_prune.benchmarks.tasks import TASKS, VISUAL, choice, count, exist, relation
from vlm_prune.benchmarks.tasks.base import SPLITS
from vlm_prune.benchmarks.tasks.scenes import (
    COLORS,
    GRID,
    NAMES,
    PHOTOGRAPHS,
    SIDE,
    _digits,
    make_scene,
)
from vlm_prune.benchmarks.tasks.vqa import exact_match, normalize

NAMES_OF_TASKS = ("exist", "attribute", "ocr", "count", "relation", "choice", "text", "iit")


@pytest.mark.parametrize("name", NAMES_OF_TASKS)
def test_same_arguments_give_the_same_sample(name: str) -> None:
    first, second = (TASKS[name].sample(5, seed=3, split="val") for _ in range(2))
    assert (first.turns[-1].text, first.answer, first.id) == (
        second.turns[-1].text,
        second.answer,
        second.id,
    )
    for left, right in zip(first.images, second.images, strict=True):
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right))


@pytest.mark.parametrize("name", VISUAL)
def test_visual_samples_show_one_photograph_of_336_pixels(name: str) -> None:
    sample = TASKS[name].sample(0)
    assert [image.size for image in sample.images] == [(SIDE, SIDE)]


@pytest.mark.parametrize("name", NAMES_OF_TASKS)
def test_index_seed_and_split_change_the_question_stream(name: str) -> None:
    def questions(seed: int, split: str) -> list[tuple[str, str]]:
        drawn = (TASKS[name].sample(i, seed, split) for i in range(12))
        return [(sample.turns[-1].text, sample.answer) for sample in drawn]

    streams = [questions(0, "val"), questions(1, "val"), questions(0, "test")]
    assert all(left != right for left, right in combinations(streams, 2))


def test_splits_share_neither_photographs_nor_handwritten_digits() -> None:
    for left, right in combinations(SPLITS, 2):
        assert not set(PHOTOGRAPHS[left]) & set(PHOTOGRAPHS[right])
        for digit, images in _digits(left).items():
            drawn = {image.tobytes() for image in images}
            assert not drawn & {image.tobytes() for image in _digits(right)[digit]}


@pytest.mark.parametrize("name", NAMES_OF_TASKS)
def test_gold_answer_scores_one_and_another_answer_zero(name: str) -> None:
    sample = TASKS[name].sample(1)
    assert TASKS[name].score(sample.answer, sample.answer) == 1.0
    assert TASKS[name].score("something else", sample.answer) == 0.0


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [("A cat.", "cat"), ("Yes", "yes"), ("three", "3"), (" the  Red ", "red")],
)
def test_answers_are_compared_as_vqa_does(prediction: str, answer: str) -> None:
    assert exact_match(prediction, answer) == 1.0
    assert normalize(prediction) == answer


def test_no_single_answer_of_a_visual_task_is_worth_much() -> None:
    for name in VISUAL:
        answers = Counter(_answers(name, 120))
        assert answers.most_common(1)[0][1] / 120 < 0.65, name


def test_names_and_colors_are_unique_in_a_scene_so_questions_have_one_answer() -> None:
    for index in range(20):
        things = make_scene(np.random.default_rng(index), "val").things
        assert len(things) >= 3
        assert len({thing.name for thing in things}) == len(things)
        assert len({thing.color for thing in things}) == len(things)
        for one, other in combinations(things, 2):
            apart = abs(one.x - other.x) * 2 >= one.width + other.width
            assert apart or abs(one.y - other.y) * 2 >= one.height + other.height


def test_patch_labels_name_the_object_at_its_center() -> None:
    scene = make_scene(np.random.default_rng(0), "train", 6)
    assert scene.patch_names.shape == scene.patch_colors.shape == (GRID, GRID)
    labels = {
        (NAMES[name - 1], list(COLORS)[color])
        for name, color in zip(scene.patch_names.ravel(), scene.patch_colors.ravel(), strict=True)
        if name
    }
    assert labels == {(thing.name, thing.color) for thing in scene.things}


def test_existence_agrees_with_the_scene() -> None:
    for index in range(60):
        rng = np.random.default_rng(index)
        scene = make_scene(rng, "val")
        question = exist.ask(rng, scene)
        shown = any(f" {t.color} {t.noun}?" in question.text for t in scene.things)
        assert question.answer == ("yes" if shown else "no")


def test_counts_agree_with_the_scene() -> None:
    rng = np.random.default_rng(2)
    scene = make_scene(rng, "val")
    question = count.ask(rng, scene)
    assert question.answer == str(sum(f"{t.kind}s" in question.text for t in scene.things))


def test_relations_agree_with_the_scene() -> None:
    for index in range(60):
        rng = np.random.default_rng(index)
        scene = make_scene(rng, "val")
        question = relation.ask(rng, scene)
        if question is None:
            continue
        words = ("left of", "right of", "above", "below")
        word = next(word for word in words if word in question.text)
        nouns = question.text.removeprefix("Is the ").removesuffix("?").split(f" {word} the ")
        first, second = (next(t for t in scene.things if t.noun == noun) for noun in nouns)
        holds = {
            "left of": first.x < second.x,
            "right of": first.x > second.x,
            "above": first.y < second.y,
            "below": first.y > second.y,
        }[word]
        assert question.answer == ("yes" if holds else "no")


def test_options_are_four_different_ones_and_the_letter_is_the_right_one() -> None:
    for index in range(40):
        text, letter = choice.list_options(np.random.default_rng(index), "red", list(COLORS))
        options = dict(re.findall(r"([A-D])\. (\w+)", text))
        assert list(options) == list("ABCD")
        assert len(set(options.values())) == 4
        assert options[letter] == "red"


def test_conversations_have_the_turns_of_their_setting() -> None:
    for index in range(24):
        sample = TASKS["iit"].sample(index, split="val")
        setting = sample.subset.split(",")
        assert ["V" if turn.images else "T" for turn in sample.turns] == setting
        assert [turn.reply is None for turn in sample.turns] == [False] * (len(setting) - 1) + [
            True
        ]
        roles = [message["role"] for message in sample.messages()]
        assert roles == ["user", "assistant"] * (len(setting) - 1) + ["user"]


def _answers(name: str, number: int) -> list[str]:
    return [TASKS[name].sample(index, split="val").answer for index in range(number)]
