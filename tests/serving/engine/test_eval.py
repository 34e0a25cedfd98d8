"""`eval --engine vllm` writes what `eval` does, and goes on where it was killed."""

import json

import pytest
from light_engines import light_engines

from vlm_prune.benchmarks.cli import app
from vlm_prune.benchmarks.evaluation.records import Results
from vlm_prune.benchmarks.evaluation.store import read_run, read_versioned

TASKS = ["--limit", "6", "--batch-size", "3", "--tasks", "attribute,text", "--budget", "64"]
OF_HUGGING_FACE = {"kept", "time_ms"}


@pytest.fixture
def evaluated(monkeypatch):
    def command(output, engine):
        arguments = ["eval", *TASKS, "--engine", engine, "--device", "cpu", "--output", output]
        monkeypatch.setattr("sys.argv", ["vlm-prune", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            app.main()
        return stop.value.code

    return command


@pytest.fixture
def answered(monkeypatch):
    with light_engines(monkeypatch) as counts:
        yield counts


def test_both_engines_give_the_same_rows_and_a_killed_run_goes_on(evaluated, answered, tmp_path):
    assert evaluated(tmp_path / "hf", "hf") == evaluated(tmp_path / "vllm", "vllm") == 0
    (results, rows), (expected, theirs) = (read_run(tmp_path / name) for name in ("vllm", "hf"))
    for row, other in zip(rows, theirs, strict=True):
        for name in set(row.__struct_fields__) - OF_HUGGING_FACE:
            assert getattr(row, name) == getattr(other, name), (row.id, name)
        assert row.kept == []
        assert row.time_ms.prefill > 0 and row.time_ms.baseline_prefill > 0
    assert results.tasks == expected.tasks and results.overall == expected.overall
    assert results.tokens == expected.tokens and results.config.engine == "vllm"

    log = tmp_path / "vllm" / "samples.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:4]) + lines[4][:40])
    (tmp_path / "vllm" / "results.json").unlink()
    del answered[:]
    assert evaluated(tmp_path / "vllm", "vllm") == 0
    # a question to warm up and the batch that is not whole, to both engines
    assert answered == [1, 1, 3, 3]
    again = read_versioned(tmp_path / "vllm" / "results.json", Results)
    assert again.tasks == expected.tasks
    assert {json.loads(line)["id"] for line in log.read_text().splitlines()} == {
        row.id for row in rows
    }
    # a folder holds the answers of one engine
    assert evaluated(tmp_path / "hf", "vllm") == 2
