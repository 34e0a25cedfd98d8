"""The commands on every model family: one small random checkpoint of each, on disk."""

import json
import math
from itertools import chain

import numpy as np
import pytest
import torch
from tiny_families import leaves_images

from vlm_prune.benchmarks.cli.support import every_method, support
from vlm_prune.benchmarks.evaluation import engine
from vlm_prune.benchmarks.evaluation.prompts import make_prompts
from vlm_prune.benchmarks.evaluation.records import Variant
from vlm_prune.benchmarks.experiments import search
from vlm_prune.benchmarks.tasks import TASKS, Sample, Task, Turn
from vlm_prune.pruning import ICR, METHODS, Best, FastV
from vlm_prune.vlm.families import family_of
from vlm_prune.vlm.load import config_of

FAST = ["--limit", "4", "--batch-size", "2", "--tasks", "exist,text,iit"]
NEW = {"max_new_tokens": 16, "do_sample": False}


def results(path):
    content = json.loads((path / "results.json").read_text())
    rows = [json.loads(line) for line in (path / "samples.jsonl").read_text().splitlines()]
    return content, rows


def lacking(tiny, method):
    return METHODS[method]().needs & family_of(tiny.model).lacks


def test_eval(run, tiny, folder, tmp_path):
    code, out, err = run(
        "eval", "--model", folder, "--method", "zoo", "--budget", "6", "--output", tmp_path, *FAST
    )
    if lacking(tiny, "zoo"):
        assert code == 2 and "Zoo needs a nonlinear projector" in err
        assert len(err.strip().splitlines()) == 1
        return
    assert code == 0, err
    content, rows = results(tmp_path)
    assert len(rows) == 4 and list(content["tasks"]) == ["exist", "text", "iit"]
    for row in rows:
        assert len(row["image_tokens"]) == row["images"]
        assert [len(set(kept)) for kept in row["kept"]] == [6] * row["images"]
        layers = len(family_of(tiny.model).decoder.layers)
        assert row["layer_tokens"] == [6.0 * (row["images"] > 0)] * layers
        assert (row["vision_flops"] > 0) == (row["images"] > 0) and row["text_tokens"] > 10
    full = set(chain.from_iterable(row["image_tokens"] for row in rows))
    assert full == {content["tokens"]["full"]}  # scenes are of one size
    assert {key: content["tokens"][key] for key in ("kept", "layer_mean")} == {
        "kept": 6, "layer_mean": 6,
    }  # fmt: skip
    for cost in ("flops", "kv_bytes"):
        assert 0 < content[cost]["pruned"] < content[cost]["baseline"]
    assert f"{content['tokens']['full']} -> 6 / 6.0" in out


def replies(processor, output, prompt):
    new = processor.batch_decode(output[:, prompt.shape[1] :], skip_special_tokens=True)
    return [reply.strip() for reply in new]


SIZES = [[0], [], [1, 2], [2]]


@pytest.fixture
def mixed(tiny, monkeypatch):
    """A task whose questions show pictures of several sizes, two, or none."""

    def make(rng, split):
        shown = SIZES[int(rng.integers(len(SIZES)))]
        color = str(rng.choice(["red", "blue"]))
        turn = Turn(f"Is {color} there?", tuple(tiny.pictures[p] for p in shown))
        return Sample((turn,), "yes")

    monkeypatch.setitem(TASKS._entries, "mixed", Task("mixed", True, make))
    return [TASKS["mixed"].sample(number) for number in range(8)]


@torch.inference_mode()
def test_images_encoded_beforehand_give_the_model_s_own_answers(tiny, mixed):
    """In one ragged batch, against `generate` on what the processor gives for each question."""
    texts = [
        tiny.processor.apply_chat_template(s.messages(), add_generation_prompt=True) for s in mixed
    ]
    pictures = [list(sample.images) for sample in mixed]
    assert sorted({len(row) for row in pictures}) == [0, 1, 2]
    prompts = make_prompts(tiny.model, tiny.processor, texts, pictures)
    ours = engine.replies_to(tiny.model, tiny.processor, prompts, 16)[0]
    for text, row, reply in zip(texts, pictures, ours, strict=True):
        given = [row] if family_of(tiny.model).by_row else row
        inputs = tiny.processor(text=[text], images=given if row else None, return_tensors="pt")
        output = tiny.model.generate(**inputs, **NEW)
        assert replies(tiny.processor, output, inputs["input_ids"]) == [reply]
    # GLM's random weights repeat one token
    assert len(set(ours)) > 2 or tiny.name.startswith("glm")


def test_images_of_several_sizes(run, tiny, folder, mixed, tmp_path, monkeypatch):
    """All tokens give the unpruned answers; a count keeps all of a smaller image, a share its share."""
    family, calls = type(family_of(tiny.model)), []
    encode = family.encode

    def counted(self, pixel_values, **inputs):
        calls.append(1)
        return encode(self, pixel_values, **inputs)

    monkeypatch.setattr(family, "encode", counted)
    names = (
        ["divprune"] if FastV().needs & family.lacks else ["divprune", "fastv", "divprune+fastv"]
    )
    code, _, err = run(
        "compare", "--model", folder, "--method", ",".join(names), "--budget", "1.0,12,0.4", "--tasks", "mixed", "--limit", "8", "--batch-size", "4", "--output", tmp_path,
    )  # fmt: skip
    assert code == 0, err
    assert len(calls) == 1 + 2  # a question to warm up, then two batches for all nine runs
    table, _ = (tmp_path / "compare.md").read_text().split("\n\n")
    assert len(table.splitlines()) == 2 + 1 + 3 * len(names)
    kinds = getattr(tiny.model.config.get_text_config(), "layer_types", None) or ["full_attention"]
    for name in names:
        content, rows = results(tmp_path / f"{name}-1.0")
        assert all(row["prediction"] == row["baseline"] for row in rows)
        assert content["flops"]["pruned"] == pytest.approx(content["flops"]["baseline"])
        for budget in (12, 0.4):
            content, rows = results(tmp_path / f"{name}-{budget}")
            for row in rows:
                full = row["image_tokens"]
                wanted = [min(budget, n) if budget == 12 else round(budget * n) for n in full]
                if name == "divprune":
                    assert [len(set(kept)) for kept in row["kept"]] == wanted
                assert all(max(k) < n for k, n in zip(row["kept"], full, strict=True))
                surplus = np.mean(wanted or [0]) - np.mean(row["layer_tokens"])
                assert -1e-9 < surplus < 1
            every = [n for row in rows for n in row["image_tokens"]]
            assert content["tokens"]["full"] == pytest.approx(np.mean(every))
            for run_, tokens in (("baseline", full_of), ("pruned", computed_of)):
                held = [512 * (row["text_tokens"] + tokens(row)) for row in rows]  # 4 layers
                bytes_ = content["kv_bytes"][run_]
                whole = set(kinds) == {"full_attention"}
                assert bytes_ == pytest.approx(np.mean(held)) if whole else bytes_ <= np.mean(held)
    assert len(set(every)) > (not family_of(tiny.model).fixed_size)
    code, _, err = run("report", tmp_path)
    assert code == 0, err
    page = (tmp_path / "report.html").read_text()
    grids = [grid for row in rows for grid in row["grids"]]
    assert ("are shown whole" in page) == (None in grids)
    if tiny.name in ("llava", "qwen2_5_vl", "qwen3_vl"):
        assert [math.prod(grid) for grid in grids] == every


def full_of(row):
    return sum(row["image_tokens"])


def computed_of(row):
    return row["images"] * np.mean(row["layer_tokens"])


@pytest.mark.parametrize("tiny", ["qwen2_5_vl"], indirect=True)
def test_a_killed_run_resumes(run, tiny, folder, mixed, tmp_path):
    command = ["eval", "--model", folder, "--method", "divprune", "--budget", "7"]
    command += ["--tasks", "mixed", "--limit", "6", "--batch-size", "2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for output in (whole, killed):
        assert run(*command, "--output", output)[0] == 0
    log = killed / "samples.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:3]) + lines[3][:40])
    (killed / "results.json").unlink()
    assert run(*command, "--output", killed)[0] == 0
    (first, first_rows), (second, second_rows) = results(whole), results(killed)
    for rows in (first_rows, second_rows):
        for row in rows:
            del row["time_ms"]
    assert first_rows == second_rows
    for part in ("tasks", "overall", "tokens", "flops", "kv_bytes"):
        assert first[part] == second[part]


def test_all_methods_are_those_that_the_matrix_allows(tiny, folder, capsys):
    works = {name for name, families in support().items() if families[tiny.name]}
    chosen = {*every_method(config_of(str(folder))), "none"}
    # the matrix is for models of any depth, on which it depends what `best` needs
    assert works <= chosen <= works | {"best"}
    said = capsys.readouterr().err.splitlines()
    assert {line.split(" left out: it needs ")[0] for line in said} == set(METHODS) - chosen


@pytest.mark.slow
def test_every_method_with_all_tokens_and_with_few(run, tiny, folder, mixed, tmp_path):
    code, _, err = run(
        "compare", "--model", folder, "--method", "all", "--budget", "1.0,12", "--tasks",
        "mixed,exist,text,iit", "--limit", "24", "--output", tmp_path,
    )  # fmt: skip
    assert code == 0, err
    for name in every_method(config_of(str(folder))):
        _, rows = results(tmp_path / f"{name}-1.0")
        assert all(row["prediction"] == row["baseline"] for row in rows), name
        _, rows = results(tmp_path / f"{name}-12")
        for row in rows:
            whole = leaves_images(METHODS[name](), tiny.model)
            wanted = [n if whole else min(12, n) for n in row["image_tokens"]]
            assert np.mean(row["layer_tokens"]) <= np.mean(wanted or [0]) + 1e-9


def test_a_report_of_text_alone(run, tiny, folder, tmp_path):
    command = ["--method", "random", "--tasks", "text", "--limit", "2", "--budget", "4"]
    assert run("eval", "--model", folder, *command, "--output", tmp_path)[0] == 0
    code, _, err = run("report", tmp_path)
    assert code == 0, err


def test_a_schedule_is_found_and_followed(run, tiny, folder, mixed, tmp_path):
    code, out, err = run(
        "schedule", "--model", folder, "--data", "mixed,iit", "--limit", "16", "--budget", "0.6",
        "--output", tmp_path,
    )  # fmt: skip
    if ICR().needs & family_of(tiny.model).lacks:  # which reads the attention of all layers, too
        assert code == 2 and "scores of attention need" in err and err.count("\n") == 1
        return
    assert code == 0, err
    found = json.loads((tmp_path / "schedule.json").read_text())
    assert found["layers"] == 4 and sum(found["histogram"]) == found["change_points"] > 9
    assert f"at budget {round(0.6 * found['tokens'])} of {found['tokens']} tokens" in out
    code, _, err = run(
        "eval", "--model", folder, "--method", "fastv", "--budget", "0.6", "--tasks", "mixed",
        "--limit", "4", "--schedule", tmp_path / "schedule.json", "--output", tmp_path / "run",
    )  # fmt: skip
    assert code == 0, err
    shown = [row for row in results(tmp_path / "run")[1] if row["images"]]
    for row in shown:
        layers = row["layer_tokens"]
        drops = [n for n in range(1, 4) if layers[n] < layers[n - 1]]
        assert set(drops) <= set(found["places"]) and layers[-1] < np.mean(row["image_tokens"])
    assert shown


def test_a_search_is_for_images_of_one_size(run, tiny, folder, tmp_path):
    command = ["search", "--model", folder, "--budget", "500", "--output", tmp_path / "out"]
    command += ["--definitions", tmp_path / "best.json"]
    code, _, err = run(*command)
    assert code == 2 and len(err.strip().splitlines()) == 1
    fixed = family_of(tiny.model).fixed_size
    assert ("above the 25 tokens" if fixed else "takes images of many") in err


@pytest.mark.parametrize("tiny", ["smolvlm"], indirect=True)
def test_a_search_on_images_of_any_size_takes_shares(run, tiny, folder, tmp_path, monkeypatch):
    """What the model lacks is left out, and what is found is what best stands for."""
    few = [Variant("divprune+merge", 0.3), Variant("zoo-exact+fastv", 0.3)]
    monkeypatch.setattr(search, "combinations", lambda budget: few)
    monkeypatch.setattr(search, "singles", lambda: ["random", "downsample", "zoo"])
    defined = tmp_path / "best.json"
    code, out, err = run(
        "search", "--model", folder, "--budget", "0.3", "--limit", "2", "--tasks", "exist,ocr",
        "--output", tmp_path / "out", "--definitions", defined,
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(defined.read_text())
    assert found["tokens"] is None and list(found["budgets"]) == ["0.3"] and "budget 0.3:" in out
    entry = found["budgets"]["0.3"]
    assert entry["combination"] == "divprune+merge"
    assert [rival["method"] for rival in entry["against"]] == ["random"]
    best = Best(budget=0.25, definitions=str(defined))
    assert best.definition(1) == entry["method"] and not best.needs
