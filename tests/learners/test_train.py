"""A few steps of every method on a random model: what moves, what stays, and what a kill costs."""

import json
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

from vlm_prune.learners import WingsConfig, from_pretrained
from vlm_prune.learners import train as train_module
from vlm_prune.learners.data import Example, read_llava
from vlm_prune.learners.model import wings_layers
from vlm_prune.learners.recipe import METHODS, PRESETS
from vlm_prune.learners.train import WingsRun, prepare, train_wings
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.folder import OutputFolder
from vlm_prune.vlm.common.state import newest
from vlm_prune.vlm.load import load

QUICK = {"projector_lr": 1e-2, "learner_lr": 1e-2, "language_lr": 1e-2, "batch": 4, "lora_rank": 2}
STAGES = {n: replace(PRESETS[f"paper-{n}"], **QUICK) for n in (1, 2)}
WINGS = WingsConfig(rank=4, max_positions=128)
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
VISION, PROJECTOR, LANGUAGE = "vision_tower", "multi_modal_projector", "language_model"


@pytest.fixture
def examples(conversations):
    return read_llava(conversations / "data.json", conversations)


@pytest.fixture
def make_run(checkpoint, tmp_path):
    def make(method, stage, name="run", model=checkpoint, **options):
        options = {"wings": WINGS, "bf16": False, "cpu": True} | options
        return WingsRun(str(model), tmp_path / name, method, STAGES[stage], **options)

    return make


def part(name):
    if ".wings." in name:
        return name.split(".wings.")[1].split(".")[1 if "learners" in name else 0]
    if "lora_" in name:
        return "lora"
    return next((p for p in (VISION, PROJECTOR, LANGUAGE) if p in name), LANGUAGE)


OPEN = {
    ("full", 1): {PROJECTOR},
    ("attn-proj", 1): {PROJECTOR},
    ("mlp-gate-up", 1): {PROJECTOR},
    ("model-dowser", 1): {PROJECTOR},
    ("lora", 1): {PROJECTOR},
    ("replay", 1): {PROJECTOR},
    ("frozen-llm", 1): {PROJECTOR, "visual"},
    ("wings", 1): {PROJECTOR, "visual"},
    ("wings-visual", 1): {PROJECTOR, "visual"},
    ("wings-textual", 1): {PROJECTOR},
    ("wings-no-router", 1): {PROJECTOR, "visual"},
    ("full", 2): {PROJECTOR, LANGUAGE},
    ("attn-proj", 2): {PROJECTOR, LANGUAGE},
    ("mlp-gate-up", 2): {PROJECTOR, LANGUAGE},
    ("model-dowser", 2): {PROJECTOR, LANGUAGE},
    ("lora", 2): {PROJECTOR, "lora"},
    ("replay", 2): {PROJECTOR, LANGUAGE},
    ("frozen-llm", 2): {PROJECTOR, "visual"},
    ("wings", 2): {PROJECTOR, LANGUAGE, "visual", "textual", "router"},
    ("wings-visual", 2): {PROJECTOR, LANGUAGE, "visual"},
    ("wings-textual", 2): {PROJECTOR, LANGUAGE, "textual"},
    ("wings-no-router", 2): {PROJECTOR, LANGUAGE, "visual", "textual"},
}


PARTLY = {
    "attn-proj": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp-gate-up": ("gate_proj", "up_proj"),
    "model-dowser": (".parametrizations.weight.0.values",),
}


# What is trained by default; the slow tests train all.
QUICKLY = ("wings", "lora", "model-dowser")


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_each_stage_opens_what_it_should_and_nothing_else(method, stage, make_run):
    model, _, groups, _ = prepare(make_run(method, stage))
    named = dict(model.named_parameters())
    opened = {name for name, parameter in named.items() if parameter.requires_grad}
    assert {part(name) for name in opened} == OPEN[method, stage]
    for whole in OPEN[method, stage] - {"lora"}:
        chosen = PARTLY.get(method, ("",)) if whole == LANGUAGE else ("",)
        for name in named:
            if part(name) == whole and "lora" not in name:
                assert (name in opened) == any(projection in name for projection in chosen), name
    grouped = [id(parameter) for parameters in groups.values() for parameter in parameters]
    assert sorted(grouped) == sorted(id(named[name]) for name in opened)


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=[] if m in QUICKLY else pytest.mark.slow) for m in METHODS]
)
def test_two_stages_change_what_they_opened_and_leave_plain_checkpoints(
    method, make_run, examples, checkpoint
):
    before = load(str(checkpoint))[0].state_dict()
    train_wings(make_run(method, 1, "one"), examples)
    second = make_run(method, 2, "two", model=make_run(method, 1, "one").output)
    train_wings(second, examples)
    model, _ = load(str(second.output / "model"))
    after = model.state_dict()
    assert after.keys() == before.keys()
    changed = {part(name) for name in after if not torch.equal(after[name], before[name])}
    opened = (OPEN[method, 1] | OPEN[method, 2]) - {"visual", "textual", "router"}
    assert changed == {LANGUAGE if name == "lora" else name for name in opened}
    assert (second.output / "wings").is_dir() == bool(METHODS[method].modalities)
    if METHODS[method].modalities:
        weights = load_file(second.output / "wings" / "adapter_model.safetensors")
        outputs = [tensor for name, tensor in weights.items() if name.endswith("output.up.weight")]
        assert len(outputs) == 3 * len(METHODS[method].modalities)
        assert all(tensor.any() for tensor in outputs)
        from_pretrained(model, second.output / "wings")
        assert model.wings.config.modalities == METHODS[method].modalities


def test_stage_two_starts_from_stage_ones_visual_learners(make_run, examples):
    train_wings(make_run("wings", 1, "one"), examples)
    one = make_run("wings", 1, "one").output
    kept = load_file(one / "wings" / "adapter_model.safetensors")
    model, *_ = prepare(make_run("wings", 2, "two", model=one))
    own = wings_layers(model)[0].state_dict()
    for name, tensor in kept.items():
        if name.startswith("layers.0."):
            assert torch.equal(own[name.removeprefix("layers.0.")], tensor)
    assert not own["learners.textual.output.up.weight"].any()


def outcome(run):
    weights = load_file(run.output / "model" / "model.safetensors")
    adapter = run.output / "wings" / "adapter_model.safetensors"
    if adapter.is_file():
        weights |= load_file(adapter)
    return weights, (run.output / "log.jsonl").read_text()


@pytest.fixture(scope="module")
def dropping(checkpoint, tmp_path_factory):
    """The checkpoint with dropout, so that every step draws random numbers."""
    folder = shutil.copytree(checkpoint, tmp_path_factory.mktemp("dropping") / "model")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["attention_dropout"] = 0.2
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=[] if m in QUICKLY else pytest.mark.slow) for m in METHODS]
)
def test_a_killed_run_goes_on_to_the_same_result(method, make_run, examples, dropping, monkeypatch):
    if method == "replay":
        # most texts are left out, and a run that is killed needs three steps
        examples = examples * 2
    whole = make_run(method, 2, "whole", model=dropping, save_every=1)
    train_wings(whole, examples)
    weights, log = outcome(whole)
    count = len(log.splitlines())
    assert [json.loads(line)["step"] for line in log.splitlines()] == [*range(1, count + 1)]

    killed = make_run(method, 2, "killed", model=dropping, save_every=1, workers=1)
    honest, steps = train_module._checkpoint, []

    def kill(output, step, *state):
        if step == 2:
            raise KeyboardInterrupt
        honest(output, step, *state)

    monkeypatch.setattr(train_module, "_checkpoint", kill)
    with pytest.raises(KeyboardInterrupt):
        train_wings(killed, examples)
    assert len((killed.output / "log.jsonl").read_text().splitlines()) == 2
    files = {path.suffix for path in (killed.output / "checkpoint-1").iterdir()}
    assert files == {".safetensors"}
    monkeypatch.setattr(train_module, "_checkpoint", honest)
    one_step = train_module._step

    def counted(*arguments):
        steps.append(1)
        return one_step(*arguments)

    monkeypatch.setattr(train_module, "_step", counted)
    train_wings(killed, examples)
    assert len(steps) == count - 1
    resumed, resumed_log = outcome(killed)
    assert resumed_log == log
    assert all(torch.equal(resumed[name], tensor) for name, tensor in weights.items())
    assert not list(killed.output.glob("checkpoint*"))
    train_wings(killed, examples)
    assert len(steps) == count - 1
    other = "wings" if method == "full" else "full"
    with pytest.raises(InputError, match="holds a run with another"):
        train_wings(replace(killed, method=other), examples)


@pytest.fixture
def stopped(make_run, examples, monkeypatch):
    """A run that was killed after its first checkpoint."""

    def stop():
        run = make_run("full", 2, save_every=1)
        with monkeypatch.context() as patch:
            patch.setattr(train_module, "seed_step", lambda _, step, __: 1 // (2 - step))
            with pytest.raises(ZeroDivisionError):
                train_wings(run, examples)
        AcceleratorState._reset_state(True)
        assert (run.output / "checkpoint-1").is_dir()
        return run

    return stop


def test_a_pickle_in_a_run_folder_is_refused_by_name_and_not_read(stopped, examples, tmp_path):
    run, marker = stopped(), tmp_path / "marker"

    class Evil:
        def __reduce__(self):
            return (marker.write_text, ("ran",))

    for name in ("optimizer.bin", "random_states_0.pkl"):
        path = run.output / "checkpoint-1" / name
        torch.save({"state": Evil()}, path)
        with pytest.raises(InputError, match=f"{name} is a pickle, which is not read") as caught:
            train_wings(run, examples)
        assert "\n" not in str(caught.value)
        path.unlink()
    assert not marker.exists()


@pytest.mark.parametrize("name", ["trained.safetensors", "optimizer.safetensors"])
def test_a_damaged_checkpoint_of_a_run_is_named(name, stopped, examples):
    run = stopped()
    path = run.output / "checkpoint-1" / name
    tensors = load_file(path)
    first = max(tensors, key=lambda name: tensors[name].numel())
    for content, message in (
        (
            {n: t for n, t in tensors.items() if n != first} | {"x|y": tensors[first]},
            "of another run",
        ),
        (tensors | {first: tensors[first][:-1].clone()}, "has another shape"),
        (None, "is damaged"),
    ):
        if content is None:
            path.write_bytes(path.read_bytes()[:100])
        else:
            save_file(content, path)
        AcceleratorState._reset_state(True)
        with pytest.raises(InputError, match=message) as caught:
            train_wings(run, examples)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    path.unlink()
    AcceleratorState._reset_state(True)
    with pytest.raises(InputError, match=f"there is no {path}"):
        train_wings(run, examples)


def test_a_run_goes_on_with_its_own_data_alone(stopped, examples, conversations, tmp_path):
    run = stopped()
    said = replace(examples[0], turns=((examples[0].turns[0][0], "no"), *examples[0].turns[1:]))
    moved = shutil.copytree(conversations, tmp_path / "moved")
    picture = moved / "0.png"
    picture.write_bytes((conversations / "1.png").read_bytes())
    shown = read_llava(moved / "data.json", moved)
    for other in ([said, *examples[1:]], examples[1:], examples[::-1], shown):
        AcceleratorState._reset_state(True)
        with pytest.raises(InputError, match="holds a run with another data"):
            train_wings(run, other)
    picture.write_bytes((conversations / "0.png").read_bytes())
    AcceleratorState._reset_state(True)
    train_wings(run, read_llava(moved / "data.json", moved))
    assert (run.output / "model").is_dir()


def test_two_trainings_do_not_share_a_folder(make_run, examples):
    run = make_run("full", 2)
    with OutputFolder(run.output), pytest.raises(InputError, match="another run writes to"):
        train_wings(run, examples)
    AcceleratorState._reset_state(True)
    train_wings(run, examples)


def test_a_full_disk_keeps_the_last_checkpoint(make_run, examples, monkeypatch):
    """A limit on the size of files stands for the disk: safetensors reports both alike."""
    whole, full = (make_run("full", 2, name, save_every=1) for name in ("whole", "full"))
    train_wings(whole, examples)
    AcceleratorState._reset_state(True)
    honest, before = train_module._checkpoint, resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(output, step, *state):
        if step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        try:
            honest(output, step, *state)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr(train_module, "_checkpoint", limited)
    with pytest.raises(OSError, match="File too large") as caught:
        train_wings(full, examples)
    assert caught.value.filename.endswith("trained.safetensors")
    assert newest(full.output, "checkpoint-N")[0] == 1
    monkeypatch.undo()
    AcceleratorState._reset_state(True)
    train_wings(full, examples)
    assert outcome(full)[1] == outcome(whole)[1]


def test_the_result_does_not_depend_on_the_micro_batch(make_run, examples):
    runs = [make_run("wings", 2, f"of-{size}", micro_batch=size) for size in (1, 4)]
    for run in runs:
        train_wings(run, examples)
    logs = [outcome(run)[1].splitlines() for run in runs]
    for a, b in zip(*logs, strict=True):
        assert json.loads(a)["loss"] == pytest.approx(json.loads(b)["loss"], rel=1e-3)


def test_each_part_has_its_own_rate_that_warms_up_and_decays(make_run, examples, capsys):
    run = make_run("wings", 2)
    rates = {"projector_lr": 3e-3, "learner_lr": 2e-3, "language_lr": 1e-3}
    train_wings(replace(run, recipe=replace(run.recipe, batch=1, warmup=0.25, **rates)), examples)
    lines = [json.loads(line) for line in (run.output / "log.jsonl").read_text().splitlines()]
    peak = max(lines, key=lambda line: line["rates"][0])
    assert peak["rates"] == pytest.approx([3e-3, 2e-3, 1e-3])
    assert peak["step"] == 4
    assert lines[0]["rates"] == [0, 0, 0]
    assert lines[-1]["rates"][0] < 1e-3
    told = "0.001 (language model), 0.003 (projector), 0.002 (learners); loss"
    assert told in capsys.readouterr().out


def test_curves_go_to_tensorboard_where_it_is_installed(make_run, examples):
    pytest.importorskip("tensorboard")
    run = make_run("full", 1)
    train_wings(run, examples)
    files = run.output.rglob("events.out.tfevents.*")
    assert any(b"loss" in events.read_bytes() for events in files)


def test_bf16_keeps_float32_weights(make_run, examples):
    run = make_run("wings", 2, bf16=True)
    train_wings(run, examples)
    weights, log = outcome(run)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    losses = [json.loads(line)["loss"] for line in log.splitlines()]
    assert all(0 < loss < 50 for loss in losses)


def test_batches_of_text_alone_train(make_run, examples):
    run = make_run("wings", 1, text_ratio=1.0)
    train_wings(run, examples)
    weights, _ = outcome(run)
    assert not any(t.any() for n, t in weights.items() if n.endswith("visual.output.up.weight"))


def test_the_presets_are_those_of_the_paper_and_its_scripts():
    assert (PRESETS["paper-1"].learner_lr, PRESETS["paper-1"].batch) == (1e-3, 32)
    two = PRESETS["scripts-2"]
    assert (two.language_lr, two.projector_lr, two.learner_lr) == (2e-6, 1e-5, 2e-6)
    assert (two.batch, two.warmup, two.clip, two.max_length) == (64, 0.03, 1.0, 2048)
    assert PRESETS["scripts-2-llava"].language_lr == pytest.approx(10 * two.language_lr)
    with pytest.raises(InputError, match="did you mean 'paper-1'"):
        PRESETS["paper1"]


def test_a_refused_start_does_not_claim_its_folder(make_run, examples):
    wrong = make_run("wings", 2, wings=WingsConfig(rank=99, max_positions=128))
    with pytest.raises(InputError, match="rank 99 is above the model's width"):
        train_wings(wrong, examples)
    AcceleratorState._reset_state(True)
    train_wings(replace(wrong, wings=WINGS), examples)
    assert (wrong.output / "model").is_dir()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (None, r"step 2: .* not finite at .*data.json\[.*lower the learning rate"),
        (MemoryError(), r"step 2: out of memory at .*data.json\[.*lower micro_batch"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "step 2: out of memory"),
    ],
    ids=str,
)
def test_a_step_that_fails_keeps_the_last_good_checkpoint(
    error, message, make_run, examples, monkeypatch
):
    run = make_run("full", 2, save_every=1)
    honest, losses = torch.nn.functional.cross_entropy, []

    def broken(*arguments, **options):
        losses.append(1)
        loss = honest(*arguments, **options)
        if len(losses) <= 4:
            return loss
        if error is not None:
            raise error
        return loss * torch.nan

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", broken)
    with pytest.raises(InputError, match=message) as caught:
        train_wings(run, examples)
    assert "checkpoint-1 is kept" in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in run.output.glob("checkpoint-*")] == ["checkpoint-1"]
    kept = load_file(run.output / "checkpoint-1" / "trained.safetensors")
    assert all(tensor.isfinite().all() for tensor in kept.values())
    monkeypatch.undo()
    AcceleratorState._reset_state(True)
    train_wings(run, examples)
    assert len((run.output / "log.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_image_is_named_with_its_sample(workers, make_run, examples, tmp_path):
    broken = tmp_path / "cut.png"
    whole = examples[0].images[0].read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    bad = replace(examples[0], images=(broken,))
    with pytest.raises(InputError, match=r"^\S+data.json\[0\] \(id '0'\): .*cut.png") as caught:
        train_wings(make_run("full", 1, workers=workers), [bad])
    assert "\n" not in str(caught.value)


def test_learners_of_another_model_or_rank_are_refused(make_run, examples):
    one = make_run("wings", 1, "one")
    train_wings(one, examples)
    other = WingsConfig(rank=2, max_positions=128)
    with pytest.raises(InputError, match="has learners of rank 4 in layers 0, 1, 2; give the same"):
        prepare(make_run("wings", 2, "two", model=one.output, wings=other))
    described = one.output / "wings" / "adapter_config.json"
    described.write_text(described.read_text().replace('"hidden_size": 32', '"hidden_size": 64'))
    with pytest.raises(InputError, match="adapter is for .*hidden_size 64.*the model is"):
        prepare(make_run("wings", 2, "two", model=one.output))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--preset", "paper-3"], "Error: unknown preset 'paper-3'"),
        (["--rank", "0"], "Error: rank 0 is out of range"),
        (["--rank", "9999"], "Error: rank 9999 is above the model's width; give 1 to "),
        (["--layers", "99"], "Error: layers [99] are outside the stack; give 0 to "),
    ],
)
def test_the_script_reports_wrong_input_in_one_line(options, message, conversations, tmp_path):
    script = Path(__file__).parents[2] / "scripts" / "train_wings.py"
    arguments = ["--data", str(conversations / "data.json"), "--output", str(tmp_path / "out")]
    arguments += ["--images", str(conversations)]
    out = subprocess.run(
        [sys.executable, str(script), "train", *arguments, *options],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert out.returncode == 2
    assert out.stderr.startswith(message)
    assert len(out.stderr.strip().splitlines()) == 1


def test_samples_beyond_the_models_window_are_refused_or_left_out_and_counted(
    make_run, examples, capsys
):
    """The window is 512 tokens, the recipe's limit 2048; a cut sample may teach nothing."""
    long = Example("long.json[0]", (), (("Is 7 red? " * 200, "no"),))
    with pytest.raises(InputError, match=r"long.json\[0\]: \d+ tokens are above the limit of 512"):
        train_wings(make_run("full", 1, "refused"), [*examples, long])
    assert not (make_run("full", 1, "refused").output / "model").exists()
    train_wings(make_run("full", 1, "left", skip_bad=True), [*examples, long])
    assert "1 sample(s) left out; the first: long.json[0]" in capsys.readouterr().err
    train_wings(make_run("full", 1, "without"), examples)
    left, without = (make_run("full", 1, name).output / "log.jsonl" for name in ("left", "without"))
    assert left.read_text() == without.read_text()
