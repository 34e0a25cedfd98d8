"""The embedded model's training runs from start to end, and goes on where it was stopped."""

import json

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from vlm_prune.benchmarks.tasks.curriculum import SceneSource, corpus
from vlm_prune.vlm.tiny import checkpoint_path
from vlm_prune.vlm.tiny.config import make_model, make_processor
from vlm_prune.vlm.tiny.language import loss_of, pack, projected
from vlm_prune.vlm.tiny.train import MORE_STAGES, STAGES, Recipe, Trainer

SHORT = Recipe(
    windows=2,
    whole=1,
    written=1,
    again=1,
    symbols=3,
    align=2,
    language=3,
    whispers=3,
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
    more = Trainer(processor, SceneSource(0), tmp_path / "more", SHORT, loaded)
    more.run(MORE_STAGES)
    stages = [json.loads(line)["stage"] for line in (tmp_path / "more" / "log.jsonl").open()]
    assert list(dict.fromkeys(stages)) == list(MORE_STAGES)


def test_colours_hear_of_things_and_options_of_letters():
    tokenizer = AutoProcessor.from_pretrained(checkpoint_path()).tokenizer
    told = "The digit 7 is red. The star is blue. What color is the star?"
    asked = "What digit is red? A. 7 B. 3 C. 0 D. 1 ASSISTANT:"
    ids = tokenizer(
        [told, asked], padding=True, padding_side="right", return_tensors="pt"
    ).input_ids
    rows, listeners, speakers = SceneSource(0).whispers(tokenizer, ids)
    words = [
        tokenizer.convert_ids_to_tokens(ids[rows, at].tolist()) for at in (listeners, speakers)
    ]
    assert rows.tolist() == [0, 0, 1, 1, 1, 1]
    assert words[0] == ["Ġred", "Ġblue", "7", "3", "0", "1"]
    assert words[1] == ["7", "Ġstar", "ĠA", "ĠB", "ĠC", "ĠD"]


def test_a_whisper_is_the_speakers_embedding_added(processor):
    model = make_model(processor).eval()
    row = SceneSource(0).text(4, 1)
    batch = pack([row], processor.tokenizer, model.config.image_token_id)
    heard = (torch.tensor([0]), torch.tensor([3]), torch.tensor([1]))
    words = model.get_input_embeddings()
    seen = []
    with torch.no_grad():
        hook = model.model.language_model.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        for whispers in (None, heard):
            loss_of(model, batch, [], projected(model), whispers)
        hook.remove()
    changed = seen[1] - seen[0]
    torch.testing.assert_close(changed[0, 3], words(batch.ids[0, 1]).detach())
    assert changed.abs().sum(-1).nonzero().tolist() == [[0, 3]]


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
