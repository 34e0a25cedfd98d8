"""`eval --engine vllm` over lmms-eval's tasks gives the rows of the Hugging Face model."""

import os

import pytest

pytest.importorskip("vllm")
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_LOGGING_LEVEL="ERROR",
)

from light_engines import light_engines

from vlm_prune.benchmarks.evaluation.store import read_run

OF_HUGGING_FACE = {"kept", "time_ms"}
TASKS = "gqa,textvqa_val,hellaswag"


@pytest.mark.vllm
def test_both_engines_give_the_same_rows(run, data_root, tmp_path, monkeypatch):
    command = ["eval", "--tasks", TASKS, "--data-root", data_root, "--limit", "12"]
    command += ["--batch-size", "2", "--budget", "16", "--device", "cpu"]
    with light_engines(monkeypatch) as answered:
        code, _, err = run(*command, "--engine", "vllm", "--output", tmp_path / "vllm")
        assert code == 0, err
        # log-likelihoods are of the Hugging Face model alone
        assert err.splitlines() == [
            "hellaswag skipped: tasks that score given answers need --engine hf"
        ]
        pruned, questions = sum(answered), 4 + 3
        assert pruned == 2 * questions
        # the folder is whole, and unpruned answers are kept for later runs
        del answered[:]
        run(*command, "--engine", "vllm", "--output", tmp_path / "vllm")
        run(*command, "--engine", "vllm", "--method", "divprune", "--output", tmp_path / "other")
        assert sum(answered) == questions
    assert run(*command, "--output", tmp_path / "hf")[0] == 0
    (results, rows), (expected, theirs) = (read_run(tmp_path / name) for name in ("vllm", "hf"))
    theirs = [row for row in theirs if row.task != "hellaswag"]
    assert len(rows) == questions
    for row, other in zip(rows, theirs, strict=True):
        for name in set(row.__struct_fields__) - OF_HUGGING_FACE:
            assert getattr(row, name) == getattr(other, name), (row.id, name)
        assert row.kept == [] and row.time_ms.prefill > 0
    for name in ("gqa", "textvqa_val"):
        assert results.tasks[name] == expected.tasks[name]
