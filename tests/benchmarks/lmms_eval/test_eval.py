"""`vlm-prune eval` over lmms-eval's tasks: real schemas, one layout, resuming, cached baseline."""

import base64
import io
import json
import re
import shutil

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from vlm_prune.benchmarks.lmms_eval.load import load_task
from vlm_prune.learners.store import WEIGHTS

FAST = ["--batch-size", "2", "--budget", "16"]
VISUAL = {
    "gqa": ("exact_match,none", 4),
    "pope": ("pope_accuracy,none", 4),
    "textvqa_val": ("exact_match,none", 3),
    "vqav2_val": ("exact_match,none", 3),
    "mmbench_en_dev_static": ("gpt_eval_score,none", 4),
    "scienceqa_img": ("exact_match,none", 3),
    "mme": ("mme_perception_score,none", 4),
    "mmmu_val": ("mmmu_acc,none", 2),
}
TEXT = {
    "hellaswag": ("acc,none", 3),
    "gsm8k": ("exact_match,strict-match", 3),
    "mmlu_anatomy": ("acc,none", 2),
    "ifeval": ("prompt_level_strict_acc,none", 2),
}


def read(folder):
    results = json.loads((folder / "results.json").read_text())
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return results, rows


def untimed(rows):
    return [{key: row[key] for key in row if key != "time_ms"} for row in rows]


def test_real_schemas(run, data_root, tmp_path):
    tasks = VISUAL | TEXT
    code, _, err = run(
        "eval", "--tasks", ",".join(tasks), "--data-root", data_root, "--limit", 4 * len(tasks),
        "--output", tmp_path / "out", *FAST,
    )  # fmt: skip
    assert code == 0 and not err, err
    results, rows = read(tmp_path / "out")
    assert list(results["tasks"]) == list(tasks) and results["skipped"] == {}
    for name, (metric, count) in tasks.items():
        task = results["tasks"][name]
        assert task["n"] == count
        assert {"accuracy", "baseline_accuracy", "accuracy_ci", "retained", "ci"} <= set(task)
        assert metric in task["metrics"] and metric in task["baseline_metrics"]
        if name not in ("mmbench_en_dev_static", "mme"):  # in per cent, and a sum
            assert task["metrics"][metric] == pytest.approx(task["accuracy"])
        own = [row for row in rows if row["task"] == name]
        assert [len(kept) for row in own for kept in row["kept"]] == [16] * (
            count * (name in VISUAL)
        )
        assert task["kept"] == (16 if name in VISUAL else 0)
    assert {row["id"] for row in rows if row["task"] == "gqa"} == {f"gqa/{i:06d}" for i in range(4)}
    assert results["time_ms"]["baseline_prefill"] > 0 and results["flops"]["pruned"] > 0
    assert run("report", tmp_path / "out", "--data-root", data_root)[0] == 0
    page = (tmp_path / "out" / "report.html").read_text()
    shown = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert {sample["task"] for sample in shown["samples"]} == set(VISUAL)
    for sample in shown["samples"]:
        (bits,), (grid,) = sample["answers"][0]["kept"], sample["grids"]
        kept = "".join(f"{byte:08b}" for byte in base64.b64decode(bits))
        assert grid == [24, 24] and kept.count("1") == 16
    seen = [Image.open(io.BytesIO(base64.b64decode(uri[23:]))) for uri in shown["images"]]
    assert {image.size for image in seen} == {(60, 60)}  # the square that a LLaVA sees
    assert run("report", tmp_path / "out")[0] == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "No pictures of pope: data set &#39;lmms-lab-encoder/POPE&#39;" in page


@pytest.mark.parametrize("name", list(VISUAL)[:6])
def test_a_json_copy_asks_what_the_parquet_copy_asks(data_root, json_root, name):
    def documents_of(root):
        task = load_task(name, root)
        for doc in task.eval_docs:
            (turn,) = task.doc_to_messages(doc)
            parts = [part.get("text") or part["url"].tobytes() for part in turn["content"]]
            yield parts, task.doc_to_target(doc)

    rows = list(documents_of(json_root))
    assert rows == list(documents_of(data_root))
    assert len({str(parts) for parts, _ in rows}) == VISUAL[name][1] > 2  # no two alike


def test_json_copies_are_run(run, checkpoint, json_root, tmp_path):
    code, _, err = run(
        "eval", "--model", checkpoint, "--tasks", "gqa,pope", "--data-root", json_root, "--limit",
        "4", "--output", tmp_path, *FAST,
    )  # fmt: skip
    assert code == 0, err
    _, rows = read(tmp_path)
    assert [(row["id"], row["subset"], row["answer"]) for row in rows] == [
        ("gqa/000000", "", "no"), ("gqa/000001", "", "yes"),
        ("pope/000000", "adversarial", "no"), ("pope/000001", "adversarial", "yes"),
    ]  # fmt: skip


def test_a_killed_run_resumes_and_the_baseline_is_cached(
    run, checkpoint, data_root, cache, tmp_path, monkeypatch
):
    from vlm_prune.benchmarks.lmms_eval import model

    answered = []
    answer = model.PrunedChat._answer

    def counted(self, batch):
        answered.extend((self.pruner is None, ask.id) for ask in batch)
        return answer(self, batch)

    monkeypatch.setattr(model.PrunedChat, "_answer", counted)
    command = [
        "eval", "--model", checkpoint, "--tasks", "pope,hellaswag", "--data-root", data_root,
        "--limit", "6", *FAST,
    ]  # fmt: skip
    assert run(*command, "--output", tmp_path / "whole")[0] == 0
    assert len(answered) == 2 * (3 + 3 * 4)
    answered.clear()
    killed = tmp_path / "killed"
    assert run(*command, "--output", killed)[0] == 0
    assert not any(unpruned for unpruned, _ in answered) and len(answered) == 3 + 3 * 4
    answered.clear()
    log = killed / "answers" / "pope" / "answers.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:2]) + lines[2][:30])
    for name in ("samples.jsonl", "results.json"):
        (killed / name).unlink()
    assert run(*command, "--output", killed)[0] == 0
    assert answered == [(False, "pope/000002")]
    (first, first_rows), (second, second_rows) = read(tmp_path / "whole"), read(killed)
    assert untimed(first_rows) == untimed(second_rows)
    assert first["tasks"] == second["tasks"] and first["overall"] == second["overall"]


@pytest.mark.slow
def test_an_adapter_changed_in_place_is_another_model(
    run, checkpoint, adapter, data_root, cache, tmp_path
):
    own = tmp_path / "wings"
    shutil.copytree(adapter, own)
    command = [
        "eval", "--model", checkpoint, "--wings", own, "--tasks", "pope", "--data-root", data_root,
        "--limit", "2", *FAST,
    ]  # fmt: skip
    assert run(*command, "--output", tmp_path / "before")[0] == 0
    weights = load_file(own / WEIGHTS)
    save_file({name: -tensor for name, tensor in weights.items()}, own / WEIGHTS)
    code, _, err = run(*command, "--output", tmp_path / "before")
    assert code == 2 and "a run with another adapter; give another --output" in err
    assert run(*command, "--output", tmp_path / "after")[0] == 0
    assert len(list((cache / "unpruned").iterdir())) == 2


def test_methods_side_by_side(run, checkpoint, data_root, tmp_path):
    code, _, err = run(
        "compare", "--model", checkpoint, "--method", "random,fastv", "--budget", "16", "--tasks",
        "pope", "--data-root", data_root, "--limit", "4", "--output", tmp_path,
    )  # fmt: skip
    assert code == 0, err
    assert len((tmp_path / "compare.md").read_text().splitlines()) == 2 + 1 + 2
    assert read(tmp_path / "fastv-16")[0]["method"] == "fastv"


def test_a_group_stands_for_its_tasks(run, checkpoint, tmp_path):
    code, _, err = run(
        "eval", "--model", checkpoint, "--tasks", "vlm_prune_visual,text", "--limit", "12",
        "--output", tmp_path, *FAST,
    )  # fmt: skip
    assert code == 0, err
    results, _ = read(tmp_path)
    counts = {name: task["n"] for name, task in results["tasks"].items()}
    visual = ("exist", "attribute", "ocr", "count", "relation", "choice")
    assert counts == dict.fromkeys(visual, 1) | {"text": 6}
