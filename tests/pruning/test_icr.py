"""Relevance of images against the model's own attention maps."""

import pytest
import torch
from tiny_families import Tiny, snapshot

from vlm_prune.pruning.icr import frame_sizes, image_relevance
from vlm_prune.pruning.registry import build
from vlm_prune.vlm.common.errors import InputError

QUESTIONS = ("Is there a 7?", "What color is the star?")


@pytest.fixture(scope="module")
def llava():
    return Tiny("llava")


def prompts(llava, *texts):
    return llava.inputs([[([0, 1, 2], texts[0])], [([3], texts[1])]])


def by_maps(model, inputs):
    """The paper's sums, from attention maps: a token's score of each image."""
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            maps = torch.stack(model(**inputs, output_attentions=True).attentions).sum(0)
    finally:
        model.set_attn_implementation("sdpa")
    shown, found = inputs["input_ids"] == model.config.image_token_index, []
    for row, own in enumerate(shown):
        question_rows = inputs["attention_mask"][row].bool()
        question_rows[: int(own.nonzero()[-1]) + 1] = False
        paid = maps[row, :, question_rows][:, :, own].mean((0, 1))
        found += paid.split(25)
    return found


def test_relevance_is_calibrated_attention(llava):
    inputs, empty = prompts(llava, *QUESTIONS), prompts(llava, "N/A", "N/A")
    ours = image_relevance(llava.model, inputs, empty)
    for score, question_rows, unasked in zip(
        ours, *(by_maps(llava.model, g) for g in (inputs, empty)), strict=True
    ):
        calibrated = (question_rows - unasked).tolist()
        mean = sum(calibrated) / 25
        spread = (sum((value - mean) ** 2 for value in calibrated) / 24) ** 0.5
        right = sum(value for value in calibrated if value > mean - 2 * spread)
        assert float(score) == pytest.approx(right, abs=1e-5)
    # an empty question is relevant to nothing
    assert not image_relevance(llava.model, empty, empty).any()
    alone = llava.inputs([[([3], QUESTIONS[1])]]), llava.inputs([[([3], "N/A")]])
    torch.testing.assert_close(
        image_relevance(llava.model, *alone)[0], ours[3], atol=1e-5, rtol=1e-4
    )


def test_prompts_with_other_images_are_refused(llava):
    inputs = prompts(llava, *QUESTIONS)
    with pytest.raises(InputError, match="have other images; give the same prompts"):
        image_relevance(llava.model, inputs, llava.inputs([[([0], "N/A")]]))


ROWS = [[([0, 1, 2], QUESTIONS[0])], [([1, 2, 3, 0], QUESTIONS[1])], [([3], QUESTIONS[1])]]
NAMES = ("icr+none", "icr+divprune+merge", "icr+fastv", "icr+divprune+fastv")


def plainly(rows, text="N/A"):
    return [[(turns[0][0], text)] for turns in rows]


@torch.inference_mode()
def greedy(model, inputs, steps=4, **more):
    return model.generate(
        **inputs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False,
        return_dict_in_generate=True, output_logits=True, **more,
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_images_that_stay_are_those_of_the_highest_relevance(name, llava):
    model, inputs = llava.model, llava.inputs(ROWS)
    pruner = build(name, budget=9, keep=2).prepared(model, llava.processor)
    scores = image_relevance(model, inputs, llava.inputs(plainly(ROWS)))
    before = snapshot(model)
    with pruner(model) as trace:
        batch = greedy(model, inputs)
        beams = greedy(model, inputs, num_beams=2)
    assert snapshot(model) == before
    stay = [
        {*(first + scores[first:end].argsort(descending=True)[:2]).tolist()}
        for first, end in ((0, 3), (3, 7), (7, 8))
    ]
    assert stay != [{0, 1}, {3, 4}, {7}] and beams.sequences.shape == batch.sequences.shape
    with torch.no_grad(), pruner(model) as trace:
        model(**inputs)
    left = {number for number, kept in enumerate(trace.kept) if len(kept)}
    assert left == set().union(*stay)
    # a row alone, and decoding from the cache
    for row, turns in enumerate(ROWS):
        with pruner(model):
            alone = greedy(model, llava.inputs([turns]))
        for step, ours in enumerate(alone.logits):
            torch.testing.assert_close(ours[0], batch.logits[step][row], atol=3e-5, rtol=1e-4)
    with pruner(model):
        plain = greedy(model, inputs, use_cache=False)
    for ours, theirs in zip(plain.logits, batch.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=3e-5, rtol=1e-4)


def test_all_images_stay_where_there_are_no_more(llava):
    model, inputs = llava.model, llava.inputs(ROWS)
    dense = greedy(model, inputs)
    for name, more in (("icr+none", {}), ("icr+divprune", {"budget": 1.0}), ("icr+pooled", {})):
        if name == "icr+pooled":
            more = {"budget": 1.0, "attention.density": 1.0, "attention.minimum": 1}
        with build(name, keep=4, **more)(model):
            ours = greedy(model, inputs)
        for mine, theirs in zip(ours.logits, dense.logits, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_beam_search_of_two_prompts_equals_that_of_each(llava):
    both = [([0, 1, 2], QUESTIONS[0]), ([3, 0], QUESTIONS[1])]
    steps = {"num_beams": 3, "max_new_tokens": 4, "min_new_tokens": 4}
    method = build("icr+divprune", budget=4, keep=1)
    with method(llava.model) as trace, torch.inference_mode():
        pair = llava.model.generate(**llava.inputs([[turn] for turn in both]), **steps)
        kept = [len(own) for own in trace.kept]
        for row, turn in enumerate(both):
            alone = llava.model.generate(**llava.inputs([[turn]]), **steps)
            assert torch.equal(pair[row, -4:], alone[0, -4:])
    # three copies of the first prompt before those of the second
    assert sorted(kept[:3]) == [0, 0, 4] and sorted(kept[9:11]) == [0, 4]


def test_frames_of_a_video_are_ranked():
    pytest.importorskip("torchvision")
    case = Tiny("qwen2_5_vl")
    rows = [[(["a", 1], QUESTIONS[0])], [(["b"], QUESTIONS[1])]]
    inputs = case.inputs(rows)
    pruner = build("icr+none", keep=2).prepared(case.model, case.processor)
    with torch.no_grad(), pruner(case.model) as trace:
        case.model(**inputs)
    kept = [indices.tolist() for indices in trace.kept]
    # a video of three frames of nine tokens and an image, and one of two frames of six
    available = trace.available
    video, image = sorted((0, 1), key=lambda item: available[item] != 27)
    frames = {token // 9 for token in kept[video]}
    assert len(kept[video]) == 9 * len(frames)
    assert len(frames) + (len(kept[image]) > 0) == 2 and len(kept[image]) in (0, available[image])
    assert kept[2] == list(range(12))
    # a newline behind the last frame goes with it
    assert frame_sizes(25, 6) == [4, 4, 4, 4, 4, 5] and frame_sizes(9, 1) == [9]
    with torch.no_grad(), pruner(case.model) as trace:
        case.model(**case.inputs(rows[:1]))
    assert [indices.tolist() for indices in trace.kept] == kept[:2]


@pytest.mark.parametrize(
    ("name", "more", "says"),
    [
        ("icr+downsample", {}, "Downsample changes images before they are encoded"),
        ("icr+vidcom2", {}, "compares the frames of a video, of which icr leaves some"),
        ("icr+best", {}, "Best cannot stand behind icr"),
        ("icr+icr", {}, "ICR cannot stand behind icr"),
        ("icr+none", {"keep": 0}, "keep 0 leaves no image"),
        ("icr+none", {"empty": 3}, "are no token ids"),
        ("divprune+icr", {}, "ICR does not act inside"),
    ],
)
def test_what_does_not_go_together_is_said_in_one_line(name, more, says):
    with pytest.raises(InputError, match=says) as refusal:
        build(name, **more)
    assert "\n" not in str(refusal.value)
