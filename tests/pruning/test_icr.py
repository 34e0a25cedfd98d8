"""Relevance of images against the model's own attention maps."""

import pytest
import torch
from tiny_families import Tiny

from vlm_prune.pruning.icr import image_relevance
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
