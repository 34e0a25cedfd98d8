"""The embedded tasks: same arguments, same sample; splits that share nothing; answers one can trust."""

import re
from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from vlm_prune.benchmarks.evaluation.engine import most_new_tokens
from vlm_prune.benchmarks.tasks import (
    ALBUM,
    TASKS,
    VISUAL,
    anywhere,
    choice,
    count,
    exist,
    hallucination,
    needle,
    relation,
    tally,
)
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

NAMES_OF_TASKS = (
    "exist",
    "attribute",
    "ocr",
    "count",
    "relation",
    "choice",
    "text",
    "iit",
    "hallucination",
)


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


def test_a_description_names_every_thing_once_and_nothing_else() -> None:
    for index in range(20):
        rng = np.random.default_rng(index)
        scene = make_scene(rng, "val")
        answer = hallucination.describe(rng, scene).answer
        assert len(scene.things) == len(hallucination.named_things(answer))
        assert set(hallucination.named_things(answer)) == {(t.name, t.color) for t in scene.things}


@pytest.mark.parametrize(
    ("prediction", "share"),
    [
        ("red star, blue digit 7, green word cat", 1.0),
        ("There is a red star and the word cat.", 1.0),
        ("A blue star.", 0.0),
        ("a red star, a red ring, the digit 7 and a dog", 0.5),
        ("a star is red, blue three", 0.5),
        ("a red and white photograph", 0.0),
        ("", 0.0),
    ],
)
def test_what_is_named_and_not_there_is_counted(prediction: str, share: float) -> None:
    assert hallucination.score(prediction, "red star, blue digit 7, green word cat") == share


def test_half_of_the_questions_about_hallucinations_ask_for_a_description() -> None:
    samples = [TASKS["hallucination"].sample(index, split="val") for index in range(60)]
    described = [s for s in samples if s.turns[-1].text == hallucination.DESCRIBE]
    assert 20 <= len(described) <= 40
    assert {s.answer for s in samples if s not in described} == {"yes", "no"}
    assert most_new_tokens(samples) == 48 and most_new_tokens([TASKS["exist"].sample(0)]) == 16


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


def test_questions_about_an_album_have_one_answer() -> None:
    subsets = Counter[str]()
    for index in range(14):
        rng = np.random.default_rng(index)
        scenes = [make_scene(rng, "val", 2) for _ in range(6)]
        things = [(number, thing) for number, s in enumerate(scenes) for thing in s.things]
        question = needle.ask(rng, scenes)
        assert question is not None
        (found,) = [(n, t) for n, t in things if question.text == f"What color is the {t.noun}?"]
        assert (f"image {found[0] + 1}", found[1].color) == (question.subset, question.answer)
        subsets[question.subset] += 1
        there = anywhere.ask(rng, scenes)
        shown = any(there.text == f"Is there a {thing.noun}?" for _, thing in things)
        assert there.answer == ("yes" if shown else "no")
        subsets[there.answer] += 1
        count = tally.ask(rng, scenes)
        assert count.answer == str(sum(thing.kind == count.subset for _, thing in things))
    # the needle is in several images, and some answers are no
    assert len(subsets) > 5 and min(subsets["yes"], subsets["no"]) > 3
    for name in ALBUM:
        first, second = (TASKS[name].sample(3, seed=1, split="val") for _ in range(2))
        assert len(first.images) == 6 and first.answer == second.answer
        assert all(map(np.array_equal, first.images, second.images))
        assert TASKS[name].score(first.answer, first.answer) == 1.0
