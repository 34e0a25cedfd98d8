"""Processes of `accelerate launch` share the questions, with one result."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.path.exists("/proc"), reason="finds the workers in /proc"),
]
ROOT = Path(__file__).resolve().parents[3]


def launch(arguments, environment):
    """Two processes in a group of their own, so that nothing is left behind.

    Without `--multi_gpu` accelerate starts one alone; they compute on the CPU, as `--device` says.
    """
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
        "--main_process_port", "0", "-m", "vlm_prune.benchmarks.cli", *map(str, arguments),
    ]  # fmt: skip
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


@pytest.fixture
def environment(cache):
    return os.environ | {"VLM_PRUNE_CACHE": str(cache), "OMP_NUM_THREADS": "1"}


def read(folder):
    results = json.loads((folder / "results.json").read_text())
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    rows.sort(key=lambda row: row["id"])
    return results, [{key: row[key] for key in row if key != "time_ms"} for row in rows]


def eval_command(checkpoint, data_root, output, tasks="pope,exist", limit=10):
    return [
        "eval", "--model", checkpoint, "--tasks", tasks, "--data-root", data_root, "--limit",
        limit, "--budget", "16", "--batch-size", "2", "--output", output,
    ]  # fmt: skip


def test_two_processes_give_the_result_of_one(run, checkpoint, data_root, tmp_path, environment):
    process = launch(eval_command(checkpoint, data_root, tmp_path / "two"), environment)
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0, out
    assert out.count("speed-up") == 1
    assert (tmp_path / "two" / "answers").is_dir()
    environment["VLM_PRUNE_CACHE"] = str(tmp_path / "other")
    assert run(*eval_command(checkpoint, data_root, tmp_path / "one"))[0] == 0
    (one, one_rows), (two, two_rows) = read(tmp_path / "one"), read(tmp_path / "two")
    assert len(one_rows) == 9 and one_rows == two_rows
    assert one["tasks"] == two["tasks"] and one["overall"] == two["overall"]


def test_a_killed_worker_loses_nothing(run, checkpoint, data_root, tmp_path, environment):
    arguments = eval_command(checkpoint, data_root, tmp_path / "two", "exist", 40)
    process = launch(arguments, environment)
    log = tmp_path / "two" / "answers" / "vlm_prune_exist" / "answers.jsonl"
    for _ in range(3000):
        if log.is_file() and log.stat().st_size:
            break
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    named = {int(pid): Path(f"/proc/{pid}/cmdline").read_text() for pid in children}
    worker = max(pid for pid, line in named.items() if "vlm_prune.benchmarks.cli" in line)
    os.kill(worker, signal.SIGKILL)
    out, _ = process.communicate(timeout=600)
    assert process.returncode != 0
    assert "SIGKILL" in out and out.count("the same command with the same --output resumes") == 1
    assert not (tmp_path / "two" / "results.json").exists()
    answered = len(log.read_text().splitlines())
    assert 0 < answered < 40
    process = launch(arguments, environment)
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0, out
    assert run(*eval_command(checkpoint, data_root, tmp_path / "one", "exist", 40))[0] == 0
    assert read(tmp_path / "one")[1] == read(tmp_path / "two")[1]
