"""However a command or a script ends early, it says so in one line; help comes without torch."""

import errno
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import typer

from vlm_prune.benchmarks.cli import continual, iit, train_tiny, train_wings
from vlm_prune.benchmarks.cli.app import run_command
from vlm_prune.vlm.common.errors import InputError

ROOT = Path(__file__).parents[3]
SCRIPTS = [
    path for path in sorted((ROOT / "scripts").glob("*.py")) if path.stem != "document_tables"
]
ENDINGS = {
    "wrong input": (InputError("no\n\x1b[31msuch"), 2, "no \\x1b[31msuch"),
    "usage": (typer.BadParameter("no such thing"), 2, "Invalid value: no such thing"),
    "full disk": (
        OSError(errno.ENOSPC, "No space left on device", "out"),
        2,
        "out: No space left on device; free some space and run it again",
    ),
    "permission": (PermissionError(errno.EACCES, "Permission denied", "out"), 2, "out: Permission"),
    "memory": (MemoryError(), 2, "out of memory; give smaller batches"),
    "GPU memory": (torch.OutOfMemoryError("CUDA\nout"), 2, "out of memory"),
    "an extra": (
        ModuleNotFoundError("No module named 'peft'", name="peft"), 2, "pip install 'vlm-prune[train]'"
    ),
    "Ctrl-C": (KeyboardInterrupt(), 130, "interrupted"),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDINGS)
def test_an_early_end_is_one_line(name, capsys):
    error, code, message = ENDINGS[name]

    def call():
        raise error

    with pytest.raises(SystemExit) as stop:
        run_command(call)
    out, err = capsys.readouterr()
    assert stop.value.code == code and message in err and not out
    assert err.startswith("Error: ") and len(err.splitlines()) == 1


def test_an_error_of_ours_is_shown_whole():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 / 0)
    with pytest.raises(ModuleNotFoundError):
        run_command(lambda: __import__("vlm_prune.nothing"))


def test_interrupting_a_command_that_resumes_says_how():
    code = (
        "import signal, sys; from vlm_prune.benchmarks.cli.app import run_command; "
        "run_command(lambda: signal.raise_signal(signal.SIGTERM), sys.argv[1])"
    )
    for name, advised in (("eval", True), ("continual", True), ("ask", False)):
        process = subprocess.run(
            [sys.executable, "-c", code, name], check=False, capture_output=True, text=True
        )
        assert process.returncode == 130
        assert ("--output resumes" in process.stderr) is advised
        assert len(process.stderr.splitlines()) == 1


# sends Ctrl-C where a module is first looked for
INTERRUPTED = """
import os, runpy, signal, sys
script, module, *arguments = sys.argv[1:]
signal.signal(signal.SIGINT, signal.default_int_handler)
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
sys.argv = [script, *arguments]
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.parametrize(
    ("script", "module", "arguments"),
    [
        ("benchmarks/cli/__main__.py", "typer", ["methods"]),
        ("benchmarks/cli/__main__.py", "vlm_prune.benchmarks.cli.bench", []),
        ("scripts/train_wings.py", "torch", ["train", "--data", "a", "--output", "b"]),
        ("scripts/iit.py", "numpy", ["build", "IIT", "--source", "mmlu"]),
        ("scripts/train_continual.py", "transformers", []),
    ],
)
def test_an_interruption_of_the_imports_is_one_line(script, module, arguments, tmp_path):
    process = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, ROOT / script, module, *arguments],
        check=False, capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert process.returncode == 130, process.stderr
    assert process.stderr.startswith("Error: interrupted") and process.stderr.count("\n") == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_behind_the_output_is_one_line():
    command = [sys.executable, "-m", "vlm_prune.benchmarks.cli", "--help"]
    with open("/dev/full", "w") as full:
        process = subprocess.run(command, check=False, stdout=full, stderr=-1, text=True)
        both = subprocess.run(command, check=False, stdout=full, stderr=full)
    assert process.returncode == both.returncode == 2
    assert "No space left on device" in process.stderr and process.stderr.count("\n") == 1


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_are_commands(script, monkeypatch, capsys):
    import runpy

    monkeypatch.setattr("sys.argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(script), run_name="__main__")
    assert stop.value.code == 0 and "Usage: vlm-prune " in capsys.readouterr().out
    assert len(script.read_text().splitlines()) < 20


def test_version_and_completion(run):
    assert run("--version") == (0, f"vlm-prune {version('vlm-prune')}\n", "")
    assert "--install-completion" in run("--help")[1]
    environment = os.environ | {
        "_VLM_PRUNE_COMPLETE": "complete_bash", "COMP_WORDS": "vlm-prune comp", "COMP_CWORD": "1"
    }  # fmt: skip
    process = subprocess.run(
        [Path(sys.executable).with_name("vlm-prune")],
        check=False, capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert process.stdout.split() == ["compare"], process.stderr


def test_a_group_without_a_command_names_its_commands(run):
    code, _, err = run("continual")
    assert (code, err) == (
        2,
        "Error: give a command of vlm-prune continual: train, compare, bench\n",
    )


def test_names_in_help_texts_are_those_of_the_registries():
    from vlm_prune.benchmarks.embedded_models.llava import STAGES
    from vlm_prune.benchmarks.experiments.iit.sources import SOURCES
    from vlm_prune.continual.methods import METHODS
    from vlm_prune.continual.streams import STREAMS
    from vlm_prune.learners.recipe import METHODS as WINGS_METHODS
    from vlm_prune.learners.recipe import PRESETS

    assert tuple(METHODS) == continual.METHODS and tuple(STREAMS) == continual.STREAMS
    assert tuple(SOURCES) == iit.SOURCES and tuple(STAGES) == train_tiny.STAGES
    assert tuple(WINGS_METHODS) == train_wings.METHODS and tuple(PRESETS) == train_wings.PRESETS
