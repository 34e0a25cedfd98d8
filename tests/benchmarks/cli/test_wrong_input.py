"""Wrong input: one clear line, exit code 2, no traceback, nothing half-written."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

CASES = {
    "method": (["--method", "zo"], "did you mean 'zoo'"),
    "pair": (["--method", "adaptinfer+zoo"], "give a method that does, such as zoo-exact"),
    "second of a pair": (["--method", "zoo+adaptinfr"], "did you mean 'adaptinfer'"),
    "preset": (["--method", "sparsevlm", "--method-args", "preset=63"], "unknown preset"),
    "task": (["--tasks", "exits"], "did you mean 'exist'"),
    "no task": (["--tasks", ","], "no task given"),
    "task twice": (["--tasks", "exist,exist"], "named twice"),
    "option": (["--bugdet", "64"], "--budget"),
    "budget 0": (["--budget", "0"], "out of range"),
    "negative budget": (["--budget", "-3"], "out of range"),
    "fraction above 1": (["--budget", "1.5"], "out of range"),
    "nan": (["--budget", "nan"], "out of range"),
    "budget in words": (["--budget", "many"], "not a number"),
    "too many tokens": (["--budget", "577"], "above the 576 tokens"),
    "positions": (["--positions", "orignal"], "did you mean 'original'"),
    "argument": (["--method-args", "steps=3"], "steps"),
    "part of a step": (
        ["--method", "vispruner", "--method-args", "step=2.5"],
        "step 2.5 is not a whole number",
    ),
    "no finite number": (
        ["--method", "cascade", "--method-args", "widening=NaN"],
        "'widening=NaN' is not a finite number",
    ),
    "neither true nor false": (
        ["--method", "cdpruner", "--method-args", "negated=no"],
        "negated 'no' is neither",
    ),
    "argument form": (["--method-args", "step"], "name=value"),
    "device": (["--device", "gpu"], "unknown device 'gpu'; give auto, cpu, cuda"),
    "no such device": (["--device", "cuda:99"], "there is no device 'cuda:99' here"),
    "dtype": (["--dtype", "float31"], "did you mean 'float32'"),
    "seed": (["--seed", "-1"], "greater than or equal to 0"),
    "limit": (["--limit", "2"], "below one question"),
    "split": (["--split", "train"], "val or test"),
    "no checkpoint": (["--model", "/nowhere/llava"], "cannot load model"),
    "model": (["--model", "tinny"], "did you mean 'tiny'"),
}


@pytest.mark.parametrize("name", CASES)
def test_wrong_options(run, checkpoint, tmp_path, name):
    extra, message = CASES[name]
    arguments = [] if "--model" in extra else ["--model", checkpoint]
    code, out, err = run("eval", *arguments, *extra, "--output", tmp_path / "out")
    assert code == 2
    assert message in err.replace("\n", " ")
    assert len(err.strip().splitlines()) == 1 and "Traceback" not in err + out
    assert not list(tmp_path.rglob("results.json")) and not list(tmp_path.rglob("*.jsonl"))


def test_a_rival_must_be_compared(run, checkpoint):
    code, _, err = run("compare", "--model", checkpoint, "--method", "zoo", "--against", "best")
    assert code == 2 and "add it to --method" in err


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--method", ","], "no method given"),
        (["--method", "zoo,zoo"], "a method is named twice"),
        (["--method", "zoo", "--budget", "64,32,64"], "a budget is named twice"),
        (["--method", "zoo", "--budget", "64,"], "not a number"),
    ],
)
def test_wrong_lists_of_methods_and_budgets(run, checkpoint, tmp_path, wrong, message):
    code, _, err = run("compare", "--model", checkpoint, *wrong, "--output", tmp_path / "out")
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_damaged_checkpoints(run, checkpoint, tmp_path):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    code, _, err = run("eval", "--model", broken)
    assert code == 2 and "cannot load model" in err and len(err.strip().splitlines()) == 1
    (broken / "config.json").write_text('{"model_type": "bert"}')
    code, _, err = run("eval", "--model", broken)
    assert code == 2 and "supported: llava" in err
    weights.unlink()
    assert run("eval", "--model", broken)[0] == 2
    (broken / "config.json").unlink()
    code, _, err = run("eval", "--model", broken)
    assert code == 2 and "no config.json" in err


@pytest.mark.skipif(os.geteuid() == 0 and not os.path.exists("/proc"), reason="needs /proc")
def test_unwritable_output(run, checkpoint, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for output in (file / "below", "/proc/vlm-prune"):
        code, _, err = run("eval", "--model", checkpoint, "--output", output)
        assert code == 2 and len(err.strip().splitlines()) == 1


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs /proc")
def test_full_disk(run, checkpoint, tmp_path, monkeypatch):
    command = [
        "eval",
        "--model",
        checkpoint,
        "--limit",
        "2",
        "--tasks",
        "text",
        "--output",
        tmp_path,
    ]

    flush = os.fsync

    def full(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("samples.jsonl"):
            raise OSError(errno.ENOSPC, "No space left on device", "samples.jsonl")
        flush(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        code, _, err = run(*command)
    assert code == 2 and "No space left on device; free some space" in err
    assert len(err.strip().splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} <= {"config.json", "samples.jsonl", ".lock"}
    assert run(*command)[0] == 0


@pytest.mark.parametrize(
    "sent", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_an_interrupted_run_leaves_a_folder_that_resumes(checkpoint, tmp_path, sent):
    command = [
        sys.executable, "-m", "vlm_prune.benchmarks.cli", "eval", "--model", checkpoint, "--tasks",
        "exist", "--limit", "300", "--batch-size", "1", "--output", tmp_path / "out",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # a test run in the background ignores Ctrl-C, and its children would too
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )  # fmt: skip
    log = tmp_path / "out" / "samples.jsonl"
    while process.poll() is None and not (log.is_file() and log.stat().st_size):
        time.sleep(0.1)
    process.send_signal(sent)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 130
    assert err.strip() == "Error: interrupted; the same command with the same --output resumes"
    assert log.read_text().endswith("\n")
    assert not (tmp_path / "out" / "results.json").exists()


def test_hostile_images(run, checkpoint, tmp_path):
    command = ["What is red?", "--model", checkpoint]
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("no image")
    Image.new("L", (10_000, 9_000)).save(tmp_path / "bomb.png")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "cut.jpg")
    cut = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(cut[: len(cut) // 2])
    for name in ("empty.png", "text.png", "bomb.png", "cut.jpg", "missing.png"):
        code, out, err = run("ask", tmp_path / name, *command)
        assert code == 2, name
        assert len(err.strip().splitlines()) == 1 and not out


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "I;16"])
def test_images_that_are_not_rgb(run, checkpoint, tmp_path, mode):
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    Image.new(mode, (50, 20)).save(path)
    assert run("ask", path, "What is red?", "--model", checkpoint)[0] == 0
