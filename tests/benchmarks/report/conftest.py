"""Run folders written by hand, with the questions that the tasks really make."""

import json
from functools import cache

import pytest

from vlm_prune.benchmarks.tasks import TASKS, VISUAL

PHASES = ("vision", "selection", "prefill", "decode")
PICTURED = 10


@cache
def question(task, index):
    """Of the real stream where a page of 60 pictures shows it."""
    if index >= PICTURED:
        return "What else?", "nothing"
    sample = TASKS[task].sample(index)
    return sample.turns[-1].text, sample.answer


def write_run(path, method="fopru", budget=64, per_task=2, tasks=VISUAL, **changes):
    """A run whose questions are answered right, odd pictured ones only without pruning.

    `changes` replace fields of every row.
    """
    config = {
        "model": "tiny", "tasks": list(tasks), "limit": per_task * len(tasks), "batch_size": 8,
        "device": "cpu", "dtype": "auto", "seed": 0, "split": "test",
        "variant": {"method": method, "budget": budget, "positions": "auto", "arguments": {}},
    }  # fmt: skip
    rows = []
    for task in tasks:
        for index in range(per_task):
            asked, answer = question(task, index)
            broken = index % 2 == 1 and index < PICTURED
            rows.append(
                {
                    "id": f"{task}/{index:06d}", "task": task, "question": asked, "answer": answer,
                    "baseline": answer, "prediction": "wrong" if broken else answer,
                    "baseline_score": 1.0, "score": float(not broken), "images": 1,
                    "kept": [list(range(budget))],
                }
                | changes
            )  # fmt: skip
    score = {"accuracy": 0.5, "baseline_accuracy": 1.0, "retained": 0.5, "ci": [0.4, 0.6]}
    results = {
        "model": "tiny", "method": method, "budget": budget, "config": config,
        "versions": {"vlm-prune": "0.1.0"}, "device": "test", "command": f"vlm-prune eval {method}",
        "tasks": {task: score | {"n": per_task, "kept": budget} for task in tasks},
        "overall": score,
        "tokens": {"full": 576, "kept": budget, "layer_mean": budget},
        "time_ms": dict.fromkeys([*PHASES, *(f"baseline_{p}" for p in PHASES)], 2.0),
        "speedup": {"prefill": 3.0, "end_to_end": 2.0},
        "flops": {"baseline": 2e9, "pruned": 1e9},
    }  # fmt: skip
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    (path / "results.json").write_text(json.dumps(results))
    (path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def make_run():
    return write_run


@pytest.fixture(scope="session")
def edit():
    """Change a JSON file in place; the change gets its content."""

    def edit(path, change):
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return edit
