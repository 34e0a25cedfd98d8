"""Run folders written by hand, with the questions that the tasks really make."""

import json
from functools import cache

from vlm_prune.benchmarks.evaluation.records import FolderRecord, RunConfig, Variant
from vlm_prune.benchmarks.tasks import TASKS, VISUAL
from vlm_prune.vlm.common.records import to_json

PHASES = ("vision", "selection", "prefill", "decode")


@cache
def question(task, index):
    sample = TASKS[task].sample(index)
    return sample.turns[-1].text, sample.answer


def pruned_right(task, index):
    """Of the first ten questions the odd ones are right without pruning alone."""
    return index % 2 == 0 or index >= 10


def write_run(
    path, method="fopru", budget=64, per_task=2, tasks=VISUAL, right=pruned_right, **changes
):
    """A run whose questions are answered right without pruning, and with it as `right` says.

    `changes` replace fields of every row.
    """
    known = RunConfig("tiny", Variant(method, budget), tuple(tasks), per_task * len(tasks))
    config = json.loads(to_json(known))
    times = dict.fromkeys([*PHASES, *(f"baseline_{p}" for p in PHASES if p != "selection")], 2.0)
    costs = {"baseline": 2e9, "pruned": 1e9}
    rows = []
    for task in tasks:
        for index in range(per_task):
            question_text, answer = question(task, index)
            rows.append(
                {
                    "id": f"{task}/{index:06d}", "task": task, "subset": "", "question": question_text,
                    "answer": answer, "prediction": answer if right(task, index) else "wrong",
                    "score": float(right(task, index)), "images": 1, "baseline": answer,
                    "baseline_score": 1.0, "image_tokens": [576], "cropped": True,
                    "grids": [[24, 24]], "text_tokens": 20, "vision_flops": 1e9,
                    "layer_tokens": [budget], "kept": [list(range(budget))], "flops": costs,
                    "kv_bytes": costs, "time_ms": times,
                }
                | changes
            )  # fmt: skip
    score = {"accuracy": 0.5, "baseline_accuracy": 1.0, "retained": 0.5, "ci": [0.4, 0.6]}
    found = {
        task: score
        | {"n": per_task, "kept": budget, "accuracy_ci": [0.4, 0.6]}
        | {"accuracy": sum(row["score"] for row in rows if row["task"] == task) / per_task}
        for task in tasks
    }
    results = {
        "schema_version": 1, "model": "tiny", "method": method, "budget": budget, "seed": 0,
        "definition": "", "config": config, "versions": {"vlm-prune": "0.1.0"}, "device": "test",
        "command": f"vlm-prune eval {method}", "tasks": found, "overall": score,
        "fixed_size": True, "time_ms": times, "flops": costs, "kv_bytes": costs,
        "tokens": {"full": 576, "kept": budget, "layer_mean": budget, "papers": None},
        "speedup": {"prefill": 3.0, "end_to_end": 2.0}, "peak_memory_bytes": 1,
    }  # fmt: skip
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(to_json(FolderRecord(kind="eval", config=known)))
    (path / "results.json").write_text(json.dumps(results))
    (path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
