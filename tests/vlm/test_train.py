"""The embedded model's training runs from start to end, and goes on where it was stopped."""

import json
import re

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from vlm_prune.benchmarks.tasks.curriculum import SceneSource, corpus
from vlm_prune.vlm.tiny.config import make_model, make_processor
from vlm_prune.vlm.tiny.initial import look_back
from vlm_prune.vlm.tiny.language import loss_of, pack, projected
from vlm_prune.vlm.tiny.train import STAGES, Recipe, Trainer

SHORT = Recipe(
    windows=2,
    whole=1,
    written=1,
    again=1,
    stories=2,
    symbols=3,
    align=2,
    language=3,
    together=1,
    scenes=3,
)


@pytest.fixture(scope="module")
def processor():
    return make_processor(corpus(200), 320)


def trained(processor, folder):
    trainer = Trainer(processor, SceneSource(0), folder, SHORT)
    trainer.run()
    return trainer.model.state_dict()


def test_a_stopped_training_ends_with_the_same_weights(processor, tmp_path):
    """But for the few whose first gradient is rounding noise, which AdamW turns into a full step."""
    whole = trained(processor, tmp_path / "whole")
    Trainer(processor, SceneSource(0), tmp_path / "parts", SHORT).run(STAGES[:2])
    resumed = trained(processor, tmp_path / "parts")
    for name, weight in whole.items():
        moved = (resumed[name] - weight).abs() > 1e-5
        assert moved.float().mean() < 0.01, name
    logged = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").open()]
    assert {line["stage"] for line in logged} >= {"windows", "whole", "symbols", "language"}
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / "whole" / "checkpoint")
    AutoProcessor.from_pretrained(tmp_path / "whole" / "checkpoint")
    half = whole["lm_head.weight"].half().float()
    torch.testing.assert_close(loaded.lm_head.weight.data, half)


def test_heads_of_the_first_layer_look_one_to_four_tokens_back(processor):
    model = make_model(processor).eval()
    look_back(model.model.language_model)
    ids = processor.tokenizer(corpus_line := next(corpus(20)), return_tensors="pt").input_ids
    assert ids.shape[1] > 8, corpus_line
    model.set_attn_implementation("eager")
    with torch.no_grad():
        first = model(input_ids=ids, output_attentions=True).attentions[0][0]
    for head, seen in enumerate(first):
        back = torch.arange(len(seen)) - seen.argmax(-1)
        assert (back[4:] == head + 1).all()
        assert (seen.max(-1).values[4:] > 0.9).all()


def test_questions_about_a_story_have_their_answers_in_it():
    rows = [SceneSource(0).text(12, seed) for seed in range(20)]
    stories = [row for row in rows if row.before.startswith("<s>USER: The ")]
    assert 4 < len(stories) < 16
    kinds = set()
    for row in stories:
        facts = row.before.removeprefix("<s>USER: ").rstrip(".").split(". ")
        told = dict(fact.removeprefix("The ").split(" is ") for fact in facts)
        for prompt, answer, kind in row.blocks:
            question, _, listed = prompt.strip().removesuffix(" ASSISTANT:").partition("?")
            options = dict(part.split(". ") for part in re.split(r" (?=[A-D]\. )", listed) if part)
            right = options.get(answer.strip(), answer.strip())
            if kind == "letter":
                assert question == f"What letter is {right}"
            elif question.startswith("What color is the "):
                assert told[question.removeprefix("What color is the ")] == right
            else:
                noun, color = question.removeprefix("What ").split(" is ")
                name = right if noun == "shape" else f"{noun} {right}"
                assert told[name] == color
            kinds.add(kind)
    assert kinds == {"told", "letter", "option"}


def test_a_question_in_a_packed_row_is_answered_as_it_is_alone(processor):
    """Blocks do not see each other: the loss of a row is the mean over its questions alone."""
    model = make_model(processor).eval()
    example = SceneSource(0).examples(1, None)[0]
    row = example.row(example.pixels, 3, lesson="all", seed=0)
    tokenizer, image_token = processor.tokenizer, model.config.image_token_id

    def loss(rows):
        with torch.no_grad():
            images = [one.image for one in rows]
            value, *_ = loss_of(model, pack(rows, tokenizer, image_token), images, projected(model))
        return float(value)

    alone = [type(row)(row.before, [block], row.image) for block in row.blocks]
    lengths = [len(tokenizer(answer).input_ids) + 1 for _, answer, _ in row.blocks]
    expected = sum(n * loss([one]) for n, one in zip(lengths, alone, strict=True)) / sum(lengths)
    assert loss([row]) == pytest.approx(expected, abs=1e-5)
