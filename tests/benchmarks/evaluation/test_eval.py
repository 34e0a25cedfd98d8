"""The main command on a real checkpoint: results, resuming, refusing another configuration."""

import json
import weakref
from importlib.util import find_spec
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch
from tiny_families import Tiny

from vlm_prune.benchmarks.evaluation import engine, timing
from vlm_prune.benchmarks.evaluation.records import PairedTimes, Results, Variant
from vlm_prune.benchmarks.evaluation.store import read_run, read_versioned
from vlm_prune.benchmarks.evaluation.tables import against, comparison_table, with_interval
from vlm_prune.pruning import METHODS, divprune

UNTIMED = PairedTimes(*[0.0] * len(PairedTimes.__struct_fields__))
FAST = ["--limit", "6", "--batch-size", "3", "--tasks", "exist,text"]


def results(folder):
    content = json.loads((folder / "results.json").read_text())
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return content, rows


def untimed(rows):
    return [{key: row[key] for key in row if key != "time_ms"} for row in rows]


def test_eval_writes_the_promised_results(run, checkpoint, tmp_path):
    code, out, err = run("eval", "--model", checkpoint, "--output", tmp_path, *FAST)
    assert code == 0, err
    assert "exist" in out and "speed-up" in out
    content, rows = results(tmp_path)
    assert {"model", "method", "budget", "seed", "versions", "command"} <= set(content)
    for task in content["tasks"].values():
        assert {"n", "accuracy", "baseline_accuracy", "retained", "ci"} <= set(task)
    assert {"accuracy", "baseline_accuracy", "retained", "ci"} <= set(content["overall"])
    assert content["tokens"] == {"full": 576, "kept": 64, "layer_mean": 64, "papers": 64}
    assert {
        "vision",
        "selection",
        "prefill",
        "decode",
        "baseline_prefill",
        "baseline_decode",
    } <= set(content["time_ms"])
    assert content["time_ms"]["vision"] == content["time_ms"]["baseline_vision"]
    assert content["flops"]["pruned"] < content["flops"]["baseline"]
    assert len(rows) == 6 == len({row["id"] for row in rows})
    assert [[len(set(kept)) for kept in row["kept"]] for row in rows] == [[64]] * 3 + [[]] * 3


SPARSE = ["--attention-args", "block=32,minimum=1,tail=8"]


def test_sparse_attention_is_evaluated_beside_a_pruner(run, checkpoint, tmp_path):
    options = ["--attention", "pooled", "--density", "0.4", *SPARSE]
    folder = tmp_path / "eval"
    code, out, err = run("eval", "--model", checkpoint, *FAST, *options, "--output", folder)
    assert code == 0, err
    content, rows = results(folder)
    assert content["method"] == "none+pooled" and content["tokens"]["kept"] == 576
    shown = [row for row in rows if row["images"]]
    for row in shown:
        assert row["densities"] == [pytest.approx(0.4, abs=0.03)] * len(row["layer_tokens"])
        # products of the causal half are counted on both sides
        assert row["flops"]["pruned"] < row["flops"]["baseline"]
    assert content["density"] == pytest.approx(
        sum(sum(row["densities"]) / len(row["densities"]) for row in shown) / len(shown)
    )
    # what all methods compute is not counted by the other share
    alone = [row["chosen_density"] for row in shown]
    assert all(0 < share < 0.4 for share in alone)
    assert content["chosen_density"] == pytest.approx(sum(alone) / len(alone))
    both = f"{content['density']:.3f} of the causal half, {content['chosen_density']:.3f} of what"
    assert f"attention          {both} methods choose" in out
    folder = tmp_path / "compare"
    code, out, err = run(
        "compare", "--model", checkpoint, "--limit", "2", "--tasks", "exist", "--method", "divprune",
        "--budget", "300", "--attention", "pooled,local", "--density", "0.8,0.5", *SPARSE,
        "--output", folder,
    )  # fmt: skip
    assert code == 0, err
    names = {f"divprune+{name}-300-density-{d}" for name in ("pooled", "local") for d in (0.8, 0.5)}
    assert names == {path.name for path in folder.iterdir() if path.is_dir()}
    header, _, unpruned, *rows = (folder / "compare.md").read_text().splitlines()
    assert " | density | of it chosen | exist | " in header
    assert " | 576 | – | – | " in unpruned
    assert len(rows) == 4
    for row in rows:
        name, density = row.split(" | ")[0].removeprefix("| ").split(" at density ")
        run_folder = folder / f"{name}-300-density-{density}"
        content, _ = results(run_folder)
        assert content["tokens"]["kept"] == 300
        assert content["density"] == pytest.approx(float(density), abs=0.1)
        shown = [f"{content[key]:.3f}" for key in ("density", "chosen_density")]
        assert row.split(" | ")[3:5] == shown
        assert f"{name} at density {density}, budget 300: first token " in out
    assert "of it chosen" in out
    sparse = read_versioned(run_folder / "results.json", Results)
    dense = msgspec.structs.replace(sparse, density=None, chosen_density=None)
    *_, row = comparison_table([sparse, dense])
    assert row[3:5] == ["–", "–"]


@pytest.mark.parametrize(
    ("command", "options", "says"),
    [
        ("eval", ["--attention", "poold"], "did you mean 'pooled'"),
        ("eval", ["--attention", "pooled", "--density", "2"], "density 2 is no share"),
        ("eval", ["--attention", "pooled", "--density", "x"], "density 'x' is no number"),
        ("eval", ["--attention", "pooled,local"], "or use compare"),
        ("eval", ["--attention", "pooled", "--attention-args", "blok=1"], "did you mean 'block'"),
        ("eval", ["--density", "0.5"], "add --attention"),
        ("eval", ["--attention", "local", "--budget", "8"], "add --method or leave out --budget"),
        (
            "compare",
            ["--attention", "local", "--budget", "8"],
            "add --method or leave out --budget",
        ),
        ("eval", ["--suite", "forgetting", "--attention", "local"], "leave out --attention"),
        ("compare", ["--attention-args", "block=8"], "add --attention"),
        ("compare", ["--attention", "local,local"], "is named twice"),
        ("compare", ["--attention", "local", "--density", "0.5,0.5"], "is named twice"),
        ("compare", ["--attention", "local", "--against", "none"], "leave out --attention"),
    ],
)
def test_what_sparse_attention_cannot_do_is_said_in_one_line(run, command, options, says):
    code, _, err = run(command, *options)
    assert code == 2 and says in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("lines", [0, 1, 4])
def test_a_killed_run_resumes_with_the_same_results(run, checkpoint, tmp_path, lines):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run("eval", "--model", checkpoint, "--output", whole, *FAST)[0] == 0
    assert run("eval", "--model", checkpoint, "--output", killed, *FAST)[0] == 0
    log = killed / "samples.jsonl"
    kept = log.read_text().splitlines(keepends=True)
    log.write_text("".join(kept[:lines]) + kept[lines][:40])
    (killed / "results.json").unlink()
    assert run("eval", "--model", checkpoint, "--output", killed, *FAST)[0] == 0
    (first, first_rows), (second, second_rows) = results(whole), results(killed)
    assert untimed(first_rows) == untimed(sorted(second_rows, key=lambda row: row["id"]))
    assert first["tasks"] == second["tasks"] and first["overall"] == second["overall"]


def test_another_configuration_in_the_folder_is_refused(run, checkpoint, tmp_path):
    run("eval", "--model", checkpoint, "--output", tmp_path, *FAST)
    before = (tmp_path / "samples.jsonl").read_text()
    code, _, err = run("eval", "--model", checkpoint, "--output", tmp_path, *FAST, "--seed", "1")
    assert code == 2 and "another seed" in err
    assert (tmp_path / "samples.jsonl").read_text() == before
    # a folder from before there was a choice of engines can be read, and not be added to
    for name in ("config.json", "results.json"):
        content = json.loads((tmp_path / name).read_text())
        del content["config"]["engine"]
        (tmp_path / name).write_text(json.dumps(content))
    assert read_run(tmp_path)[0].config.engine == "hf"
    code, _, err = run("eval", "--model", checkpoint, "--output", tmp_path, *FAST)
    assert code == 2 and "give another --output" in err and len(err.strip().splitlines()) == 1


def test_none_equals_the_unpruned_model(run, checkpoint, tmp_path):
    run("eval", "--model", checkpoint, "--method", "none", "--output", tmp_path, *FAST)
    _, rows = results(tmp_path)
    assert all(row["baseline"] == row["prediction"] for row in rows)


def test_the_tower_runs_once_for_baseline_and_all_methods(run, checkpoint, tmp_path, monkeypatch):
    from vlm_prune.vlm.families.llava import Llava

    calls, encode = [], Llava.encode

    def counted(self, pixel_values, **inputs):
        calls.append(len(pixel_values))
        return encode(self, pixel_values, **inputs)

    monkeypatch.setattr(Llava, "encode", counted)
    run(
        "compare", "--model", checkpoint, "--method", "random,zoo-exact,adaptinfer", "--budget",
        "64,32", "--output", tmp_path, "--limit", "4", "--batch-size", "4", "--tasks", "exist",
        "--against", "zoo-exact",
    )  # fmt: skip
    assert calls == [1, 4]  # one question to warm up, then the batch
    assert len(list(tmp_path.glob("*/results.json"))) == 6
    table, overview, pairs = (tmp_path / "compare.md").read_text().split("\n\n")
    assert "density" not in table
    assert len(table.splitlines()) == 2 + 1 + 6
    cut = read_versioned(tmp_path / "adaptinfer-32" / "results.json", Results)
    header, _, *rows = overview.splitlines()
    assert header.endswith("| 64 | 32 |")
    assert rows[2].startswith("| adaptinfer | ")
    assert rows[2].split(" | ")[2].startswith(f"{with_interval(cut.overall)} at ")
    assert [line.split(" | ")[:2] for line in pairs.splitlines()[2:]] == [
        ["| 64", "random"], ["| 64", "adaptinfer"], ["| 32", "random"], ["| 32", "adaptinfer"],
    ]  # fmt: skip


def untimed_rows(pruners, llava, processor, batch):
    return [
        [msgspec.structs.replace(row, time_ms=UNTIMED) for row in rows]
        for rows in engine._answer(llava, processor, batch, pruners)
    ]


@pytest.mark.parametrize(
    "names",
    [
        ["divprune", "merge"],
        pytest.param(list(METHODS), marks=pytest.mark.slow),
    ],
    ids=["some", "all"],
)
def test_rows_of_methods_side_by_side_are_those_of_each_alone(names, llava, processor):
    batch = engine.samples_of(("exist", "text"), 4, 0, "test")[1:3]
    names = [name for name in names if "videos" not in METHODS[name]().needs]
    pruners = [
        METHODS[name](budget=budget).prepared(llava, processor)
        for budget in (64, 32)
        for name in names
    ]
    together = untimed_rows(pruners, llava, processor, batch)
    for pruner, rows in zip(pruners, together, strict=True):
        assert [rows] == untimed_rows([pruner], llava, processor, batch), pruner


def test_what_is_the_same_is_done_once(llava, processor, monkeypatch):
    batch, calls, found = engine.samples_of(("exist",), 2, 0, "test")[:], [], []
    replies, choose = engine.replies_to, divprune.max_min

    def counted(*given):
        calls.append(given[4:])
        return replies(*given)

    monkeypatch.setattr(engine, "replies_to", counted)
    monkeypatch.setattr(divprune, "max_min", lambda *given: found.append(1) or choose(*given))
    methods = [("none", 64), ("divprune", 64), ("none", 32), ("divprune", 32), ("best", 32)]
    pruners = [METHODS[name](budget=budget) for name, budget in methods]
    rows = list(engine._answer(llava, processor, batch, pruners))
    # the unpruned model, none, and divprune at two budgets, of which best is one here
    assert len(calls) == 4 and found == [1]
    assert rows[0] == rows[2] and rows[3] == rows[4] != rows[1]
    assert rows[3][0].time_ms.selection > 0


def test_one_token_is_not_all_of_them(llava, processor):
    batch = engine.samples_of(("exist",), 1, 0, "test")[:]
    pruners = [METHODS["divprune"](budget=budget) for budget in (1.0, 1)]
    kept = [len(rows[0].kept[0]) for rows in engine._answer(llava, processor, batch, pruners)]
    assert kept == [576, 1]


def test_methods_are_set_against_others_of_their_own_budget():
    budgets = (("ours", 1), ("ours", 1.0), ("theirs", 1))
    runs = [SimpleNamespace(method=method, budget=budget) for method, budget in budgets]
    scores = [{"exist": np.full(4, score)} for score in (1.0, 0.0, 0.0)]
    (row,) = against("ours", runs, scores)[1:]
    assert row[:2] == ["1", "theirs"] and row[2].startswith("+100.0")


def test_limit_is_spread_evenly():
    drawn = engine.samples_of(("text", "iit", "exist"), 10, 0, "test")
    assert [sample.id.split("/")[0] for sample in drawn] == ["text"] * 3 + ["iit"] * 3 + [
        "exist"
    ] * 4


def test_a_wings_adapter_is_attached_for_every_task_and_method(run, checkpoint, adapter, tmp_path):
    common = ["eval", "--model", checkpoint, "--limit", "6", "--tasks", "exist,text,iit"]
    plain, winged = tmp_path / "plain", tmp_path / "winged"
    assert run(*common, "--output", plain)[0] == 0
    code, _, err = run(*common, "--output", winged, "--wings", adapter)
    assert code == 0, err
    (without, before), (content, after) = results(plain), results(winged)
    assert content["config"]["wings"] == str(adapter)
    assert {row["task"] for row in after} == {"exist", "text", "iit"}
    for key in ("baseline", "prediction"):
        assert any(a[key] != b[key] for a, b in zip(before, after, strict=True)), key
    assert content["flops"]["pruned"] > without["flops"]["pruned"]
    code, _, err = run(*common, "--wings", tmp_path / "nothing")
    assert code == 2 and "cannot read an adapter" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "vlm"], "did you mean 'vllm'"),
        (["--engine", "vllm", "--attn", "eager"], "runs one method on the model alone"),
        (["--engine", "vllm", "--method", "fastv"], "inside the language model"),
        (["--engine", "vllm", "--budget", "577"], "above the 576 tokens"),
        (["--engine", "vllm"], "vLLM is not installed"),
    ],
)
def test_what_vllm_cannot_run_is_refused_in_one_line(run, tmp_path, options, message):
    if message == "vLLM is not installed" and find_spec("vllm"):
        pytest.skip("vLLM is installed")
    code, _, err = run("eval", "--output", tmp_path / "out", *FAST, *options)
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1
    assert not list(tmp_path.glob("out/*.json"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--engine", "vllm"],
            "without --device-map, --quantization, --attn, --adapter, --compile",
        ),
        (["--attention", "pooled"], "compiles decoder layers as they are, without"),
        (["--wings", "folder"], "compiles decoder layers as they are, without"),
        (["--attn", "flex_attention"], "only sdpa and eager attention are compiled"),
    ],
)
def test_what_is_not_compiled_is_refused_in_one_line(run, checkpoint, options, message):
    code, _, err = run("eval", "--compile", "--model", checkpoint, *FAST, *options)
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1


@pytest.mark.slow
def test_compiling_changes_times_alone(run, checkpoint, tmp_path):
    common = ["eval", "--method", "divprune", "--model", checkpoint, *FAST]
    plain, compiled = tmp_path / "plain", tmp_path / "compiled"
    assert run(*common, "--output", plain)[0] == 0
    code, _, err = run(*common, "--output", compiled, "--compile")
    assert code == 0, err
    (_, before), (content, after) = results(plain), results(compiled)
    assert content["config"]["compile"] and untimed(before) == untimed(after)
    # what compiling took is in no phase
    for phase in ("prefill", "baseline_prefill"):
        assert max(row["time_ms"][phase] for row in after) < 5e3


def test_a_call_that_compiles_is_timed_anew(monkeypatch):
    compiled, calls = iter([0, 1, 1, 1, 1, 2]), []
    monkeypatch.setattr(timing, "compilations", lambda: next(compiled))

    def call():
        calls.append(len(calls))
        return calls[-1]

    assert timing.settled(call, torch.device("cpu")) == 1
    assert timing.settled(call, torch.device("cpu")) == 2
    assert timing.settled(call, torch.device("cuda")) == 5


def test_questions_are_drawn_batch_by_batch_and_only_those_without_a_row(
    run, checkpoint, tmp_path, monkeypatch
):
    """However many there are, the pictures of one batch are held at a time."""
    drawn, held = [], []
    draw = engine.Samples._drawn

    def watched(self, name):
        sample = draw(self, name)
        drawn.append(name)
        held.append(weakref.ref(sample))
        assert sum(one() is not None for one in held) <= 2 * 3
        return sample

    monkeypatch.setattr(engine.Samples, "_drawn", watched)
    command = ["eval", "--model", checkpoint, "--tasks", "exist,text", "--limit", "11"]
    command += ["--batch-size", "3", "--output", tmp_path / "run"]
    assert run(*command)[0] == 0
    assert len(drawn) == 11 and len(set(drawn)) == 11
    log = tmp_path / "run" / "samples.jsonl"
    rows = log.read_text().splitlines(keepends=True)
    log.write_text("".join(rows[:9]))
    drawn.clear()
    assert run(*command)[0] == 0
    # rows that are there are checked, and the last batch is made
    assert drawn == [json.loads(row)["id"] for row in rows]
    assert len(log.read_text().splitlines()) == 11


def test_videos_of_unlike_length_are_answered_beside_each_other(run, tmp_path):
    """LLaVA-OneVision encodes videos of one length at a time."""
    tiny = Tiny("llava_onevision")
    tiny.model.save_pretrained(tmp_path / "model")
    tiny.processor.save_pretrained(tmp_path / "model")
    options = ["--method", "frames", "--budget", "0.1", "--tasks", "event,order", "--limit", "4"]
    rows = []
    for size in ("4", "1"):
        folder = tmp_path / size
        code, _, err = run(
            "eval", "--model", tmp_path / "model", *options, "--batch-size", size,
            "--output", folder,
        )  # fmt: skip
        assert code == 0, err
        rows.append([(row["id"], row["kept"]) for row in results(folder)[1]])
    assert rows[0] == rows[1] and len(rows[0]) == 4


@pytest.mark.parametrize(("family", "groups"), [("llava_onevision", [2, 2]), ("qwen2_5_vl", [4])])
def test_videos_of_one_length_are_answered_together_wherever_they_stand(family, groups):
    """LLaVA-OneVision takes one length at a time, Qwen2.5-VL any."""
    tiny, pruner = Tiny(family), Variant("frames", 0.1).build(0)
    names = [("event", 0), ("order", 0), ("event", 1), ("order", 1)]
    batch = [
        engine.drawn_sample(*name, 0, "val", frames)
        for name, frames in zip(names, (6, 4) * 2, strict=True)
    ]
    assert [len(group) for group in engine.encoded_together(tiny.processor, batch)] == groups

    def answers(batch):
        (rows,) = engine._answer(tiny.model, tiny.processor, batch, [pruner])
        return [(row.id, row.prediction, row.baseline, row.kept) for row in rows]

    assert answers(batch) == [row for sample in batch for row in answers([sample])]
