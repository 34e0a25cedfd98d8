"""The commands on every model family: one small random checkpoint of each, on disk."""

import json
from itertools import chain

import numpy as np
import pytest
import torch

from vlm_prune.benchmarks import run as engine
from vlm_prune.benchmarks.prompts import make_prompts
from vlm_prune.benchmarks.tasks import TASKS, Sample, Task, Turn
from vlm_prune.pruning import METHODS
from vlm_prune.vlm.families import family_of

FAST = ["--limit", "4", "--batch-size", "2", "--tasks", "exist,text,iit"]
NEW = {"max_new_tokens": engine.MAX_NEW_TOKENS, "do_sample": False}


@pytest.fixture(scope="session")
def folder(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp(tiny.name)
    tiny.model.save_pretrained(path)
    tiny.processor.save_pretrained(path)
    return path


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
        assert code == 2 and "Zoo needs a two-layer projector" in err
        assert len(err.strip().splitlines()) == 1
        return
    assert code == 0, err
    content, rows = results(tmp_path)
    assert len(rows) == 4 and list(content["tasks"]) == ["exist", "text", "iit"]
    for row in rows:
        assert len(row["image_tokens"]) == row["images"]
        assert [len(set(kept)) for kept in row["kept"]] == [6] * row["images"]
        assert row["layer_tokens"] == [6.0 * (row["images"] > 0)] * 4
        assert (row["vision_flops"] > 0) == (row["images"] > 0) and row["text_tokens"] > 10
    full = set(chain.from_iterable(row["image_tokens"] for row in rows))
    assert full == {content["tokens"]["full"]}  # scenes are of one size
    assert {key: content["tokens"][key] for key in ("kept", "layer_mean")} == {
        "kept": 6, "layer_mean": 6,
    }  # fmt: skip
    for cost in ("flops", "kv_bytes"):
        assert 0 < content[cost]["pruned"] < content[cost]["baseline"]
    assert f"{content['tokens']['full']} -> 6 / 6.0" in out
