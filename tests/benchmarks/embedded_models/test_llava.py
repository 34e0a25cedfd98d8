"""The embedded model's training runs from start to end, and goes on where it was stopped."""

import json
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from vlm_prune.benchmarks.embedded_models.curriculum import TINY_FORMAT, pair, what
from vlm_prune.benchmarks.embedded_models.initial import add_look_back, look_back
from vlm_prune.benchmarks.embedded_models.language import attend_packed, loss_of, pack, projected
from vlm_prune.benchmarks.embedded_models.llava import STAGES, LlavaRecipe, Trainer
from vlm_prune.benchmarks.embedded_models.log import recorder
from vlm_prune.benchmarks.embedded_models.source import SceneSource, scenes, tokenizer_texts
from vlm_prune.benchmarks.embedded_models.store import save_language_model
from vlm_prune.benchmarks.embedded_models.symbols import word_ids
from vlm_prune.benchmarks.embedded_models.text import train_text
from vlm_prune.benchmarks.embedded_models.tower import optimizers
from vlm_prune.benchmarks.experiments.forgetting.experiment import load_language_model
from vlm_prune.benchmarks.tasks.scenes import KINDS
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.folder import OutputFolder
from vlm_prune.vlm.tiny.config import make_model, make_processor

SHORT = LlavaRecipe(
    windows=2,
    whole=1,
    written=1,
    again=1,
    stories=2,
    symbols=3,
    align=2,
    language=3,
    practice=1,
    scenes=3,
)


@pytest.fixture(scope="module")
def processor():
    return make_processor(tokenizer_texts(200), 320)


def trained(processor, folder, stages=STAGES):
    torch.manual_seed(0)
    model = make_model(processor)
    look_back(model.model.language_model)
    Trainer(processor, SceneSource(0), folder, SHORT, model).run(stages)
    return model.state_dict()


@pytest.mark.slow
def test_a_stopped_training_ends_with_the_same_weights(processor, tmp_path):
    """But for the few whose first gradient is rounding noise, which AdamW turns into a full step."""
    whole = trained(processor, tmp_path / "whole")
    trained(processor, tmp_path / "parts", STAGES[:3])
    resumed = trained(processor, tmp_path / "parts")
    for name, weight in whole.items():
        moved = (resumed[name] - weight).abs() > 1e-5
        assert moved.float().mean() < 0.05, name
    logged = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").open()]
    assert {line["stage"] for line in logged} >= {"windows", "whole", "symbols", "language"}
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / "whole" / "checkpoint")
    AutoProcessor.from_pretrained(tmp_path / "whole" / "checkpoint")
    half = whole["lm_head.weight"].half().float()
    torch.testing.assert_close(loaded.lm_head.weight.data, half)


def test_a_folder_is_of_one_recipe_and_one_training(processor, tmp_path):
    model = make_model(processor)

    def trainer(recipe):
        return Trainer(processor, SceneSource(0), tmp_path, recipe, model)

    trainer(SHORT).run(())
    with pytest.raises(InputError, match="holds a run with another"):
        trainer(replace(SHORT, seed=1)).run(())
    with OutputFolder(tmp_path), pytest.raises(InputError, match="another run writes to"):
        trainer(SHORT).run(())
    stage = tmp_path / "tower.safetensors"
    save_file({"x": torch.ones(1)}, stage)
    for content in (stage.read_bytes(), b"", b"x" * 99):
        stage.write_bytes(content)
        with pytest.raises(InputError, match=f"{stage} cannot be used; remove it") as caught:
            trainer(SHORT).run(("tower",))
        assert "\n" not in str(caught.value)


def test_the_first_layer_looks_back_and_adds_nothing_until_it_is_woken(processor):
    model = make_model(processor).eval()
    decoder = model.model.language_model
    look_back(decoder)
    model.set_attn_implementation("eager")
    words = word_ids(processor.tokenizer, ["star", "red", "blue"])
    story = processor.tokenizer("The star is red. The 7 is", return_tensors="pt").input_ids
    with torch.no_grad():
        before = model(input_ids=story, output_attentions=True, output_hidden_states=True)
        add_look_back(decoder, words)
        awake = model(input_ids=story, output_hidden_states=True)
    torch.testing.assert_close(before.hidden_states[1], before.hidden_states[0])
    for head, seen in enumerate(before.attentions[0][0, :2]):
        back = torch.arange(len(seen)) - seen.argmax(-1)
        assert (back[2:] == head + 1).all()
        assert (seen.max(-1).values[2:] > 0.9).all()
    star, red = (story[0].tolist().index(word) for word in words[:2])
    added = (awake.hidden_states[1] - awake.hidden_states[0])[0]
    said = awake.hidden_states[0][0, star]
    assert red == star + 2
    torch.testing.assert_close(added[red], 0.5 * said, atol=0.1 * float(said.std()), rtol=0.1)


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


def test_training_questions_without_a_kind_are_answered_by_one_thing_alone():
    rng = np.random.default_rng(0)
    for scene, _ in zip(scenes(7), range(30), strict=False):
        things = {thing.color: thing.name for thing in scene.things}
        both = things | {name: color for color, name in things.items()}
        drawn_question = what(rng, scene)
        assert (
            drawn_question.text
            == f"What is {next(c for c in things if things[c] == drawn_question.answer)}?"
        )
        short = pair(rng, scene)
        assert both[short.text] == short.answer
        assert (short.text in things) == (short.subset == "colored")
        prompt, answer, _ = TINY_FORMAT.block(short.subset, short)
        assert (prompt, answer) == (f" {short.text}", f" {short.answer}")


def test_prose_is_every_kind_of_text_and_says_what_it_asks_for():
    kinds = set()
    for row in (SceneSource(0).prose(12, seed) for seed in range(60)):
        assert row.image is None
        for prompt, answer, kind in row.blocks:
            kinds.add(kind)
            if kind == "recite":
                assert row.before == "<s>USER:" and prompt == f" Repeat{answer}. ASSISTANT:"
            elif kind in ("named", "color", "ocr", "shape", "colored"):
                assert answer in row.before, (row.before, prompt)
            elif kind == "count":
                things = row.before.removeprefix("<s>USER: The ").split(". The ")
                sort = prompt.split()[2]
                counted = Counter(
                    first if first in KINDS else "shape" for first in (t.split()[0] for t in things)
                )
                assert int(answer) == counted[sort.removesuffix("s")]
    told = {"named", "colored", "color", "shape", "ocr", "count", "exist", "choice"}
    plain = {"arithmetic", "comparison", "ordering", "lookup"}
    assert kinds == {"recite", "told", "letter", "option"} | told | plain


@pytest.mark.slow
def test_a_language_model_learns_text_alone_and_its_file_is_a_base(processor, tmp_path):
    torch.manual_seed(0)
    model = make_model(processor)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train_text(model, processor, SceneSource(0), 2, recorder(tmp_path / "log.jsonl", "text"))
    after = model.state_dict()
    moved = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    assert moved and all("language_model" in name or name == "lm_head.weight" for name in moved)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").open()]
    assert [line["step"] for line in lines] == [0, 1]
    save_language_model(model, tmp_path / "text.safetensors")
    fresh = make_model(processor)
    load_language_model(fresh, tmp_path / "text.safetensors")
    for name, tensor in fresh.model.language_model.state_dict().items():
        torch.testing.assert_close(
            tensor, model.model.language_model.state_dict()[name].half().float(), msg=name
        )


def test_the_projector_takes_a_tenth_of_the_other_weights_steps(processor):
    model = make_model(processor).model
    muon, adam = optimizers([model.language_model, model.multi_modal_projector], 1e-3)
    slow = {id(p) for group in adam.param_groups if group["share"] == 0.1 for p in group["params"]}
    assert slow == {id(p) for p in model.multi_modal_projector.parameters()}
    assert all(p.ndim == 2 for group in muon.param_groups for p in group["params"])


def test_a_question_in_a_packed_row_is_answered_as_it_is_alone(processor):
    """Blocks do not see each other: the loss of a row is the mean over its questions alone."""
    model = make_model(processor).eval()
    example = SceneSource(0).examples(1, None)[0]
    features = torch.randn(576, model.config.vision_config.hidden_size)
    row = example.row(features, 3, lesson="all", seed=0)
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


def test_attention_over_packed_rows_leaves_out_only_what_the_mask_forbids(processor):
    """The same loss and gradients as with all pairs, over rows whose questions begin elsewhere."""
    model = make_model(processor)
    decoder = model.model.language_model
    images = [torch.randn(n, model.config.vision_config.hidden_size) for n in (20, 60)]
    examples = SceneSource(0).examples(2, None)
    rows = [e.row(image, 40, "all", 0) for e, image in zip(examples, images, strict=True)]
    batch = pack(rows, processor.tokenizer, model.config.image_token_id)
    assert len(batch.spans) > 1
    assert batch.spans[-1].seen > batch.spans[-1].prefix  # pairs are left out
    found = []
    for use in (lambda decoder: decoder.set_attn_implementation("sdpa"), attend_packed):
        use(decoder)
        model.zero_grad()
        loss, _ = loss_of(model, batch, images, projected(model))
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in decoder.layers.parameters())])
    for whole, some in zip(*found, strict=True):
        torch.testing.assert_close(some, whole, atol=1e-6, rtol=1e-4)
