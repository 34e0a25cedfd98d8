"""Rows that stand for images: as the pruned Hugging Face model gets them."""

import base64
import io

import numpy as np
import pytest
import torch
from tiny_families import Tiny

from vlm_prune.pruning.registry import build
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.serving import as_content, image_embeds
from vlm_prune.vlm.serving.embeds import FAMILIES


@pytest.fixture(scope="module", params=FAMILIES)
def served(request):
    return Tiny(request.param)


@pytest.mark.parametrize("method", ["cdpruner", "divprune", "none"])
def test_rows_are_those_that_the_pruned_model_gets(served, method):
    pruner = build(method, budget=5)
    questions = ["Is there a 7?", "What color is the star?"]
    own, other = image_embeds(
        served.model, [served.pictures[:2], served.pictures[0]], questions, pruner, served.processor
    )
    assert len(own) == 2 and len(other) == 1
    if method != "none":
        assert all(len(rows) == 5 for rows in [*own, *other])
    inputs = served.inputs([[([0, 1], questions[0])]])
    with pruner(served.model) as trace, torch.no_grad():
        served.model.generate(**inputs, max_new_tokens=1)
    full = served.encode(inputs).projected
    for rows, whole, kept in zip(own, full, trace.kept, strict=True):
        torch.testing.assert_close(rows, whole[kept])


def test_a_question_changes_what_a_text_guided_method_keeps(served):
    pruner = build("cdpruner", budget=4)
    picture = served.pictures[2]
    rows = [
        image_embeds(served.model, [picture], [text], pruner, served.processor)[0][0]
        for text in ("Is there a 7?", "red blue green yellow purple")
    ]
    assert not torch.equal(*rows)


def test_an_image_token_in_a_question_is_no_image(served):
    pruner, picture = build("divprune", budget=4), served.pictures[2]
    marked, plain = (
        image_embeds(served.model, [picture], [text], pruner, served.processor)
        for text in (f"a {served.processor.image_token} b", "a b")
    )
    assert len(marked[0]) == 1 and torch.equal(marked[0][0], plain[0][0])


def test_the_parts_of_a_message_hold_the_rows():
    rows = [torch.randn(3, 4), torch.randn(2, 4).bfloat16()]
    for part, own in zip(as_content(rows), rows, strict=True):
        assert part["type"] == "image_embeds"
        file = io.BytesIO(base64.b64decode(part["image_embeds"]))
        assert torch.equal(torch.from_numpy(np.load(file)), own.float())


def test_what_cannot_be_sent_is_one_line(served):
    picture = served.pictures[0]
    for method in ("fastv", "downsample"):
        with pytest.raises(InputError, match="does more than choose"):
            image_embeds(served.model, [picture], ["?"], build(method), served.processor)
    with pytest.raises(InputError, match="2 prompts"):
        image_embeds(served.model, [picture], ["?", "!"], build("zoo", budget=5), served.processor)
    qwen = Tiny("qwen3_vl")
    with pytest.raises(InputError, match="use the plug-in"):
        image_embeds(qwen.model, [picture], ["?"], build("zoo"), qwen.processor)
