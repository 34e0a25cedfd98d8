"""The wheel that is built from the source distribution runs where only what it requires is installed."""

import subprocess
import sys
import zipfile
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
MODULES = (
    "import importlib, importlib.util, pkgutil\n"
    "assert not [name for name in ('datasets', 'ray', 'pytest') if importlib.util.find_spec(name)]\n"
    "for name in ('vlm', 'pruning', 'learners', 'continual', 'benchmarks.cli', 'benchmarks.tasks'):\n"
    "    package = importlib.import_module(f'vlm_prune.{name}')\n"
    "    for found in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
    "        if 'serving' not in found.name and not found.name.endswith('__main__'):\n"
    "            importlib.import_module(found.name)\n"
)


def required(name: str, extras: frozenset[str] = frozenset()) -> dict[str, Distribution]:
    """Everything that a distribution requires here, directly or not, by name."""
    found: dict[str, Distribution] = {}
    pending = [(name, extras)]
    while pending:
        name, extras = pending.pop()
        for text in distribution(name).requires or ():
            wanted = Requirement(text)
            marked = wanted.marker is None or any(
                wanted.marker.evaluate({"extra": extra}) for extra in ("", *extras)
            )
            if marked and wanted.name.lower() not in found:
                found[wanted.name.lower()] = distribution(wanted.name)
                pending.append((wanted.name, frozenset(wanted.extras)))
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built by `python -m build` with the tools of this environment: an sdist, then a wheel of it."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(folder.glob("*.tar.gz"))) == 1
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """An environment that sees the wheel and what it requires, and nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    for found in required("vlm-prune").values():
        for file in found.files or ():
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (packages / top).exists():
                (packages / top).symlink_to(Path(str(found.locate_file(top))))
    install = [sys.executable, "-m", "pip", "--python", folder / "bin/python", "install"]
    subprocess.run([*install, "--no-deps", "--no-index", "--quiet", wheel], check=True)
    return folder / "bin"


def test_the_wheel_holds_the_license_and_the_weights(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for end in ("LICENSE", "vlm/tiny/checkpoint/model.safetensors", "pruning/best_tiny.json"):
        assert any(name.endswith(end) for name in names), end
    assert all(name.startswith(("vlm_prune/", "vlm_prune-")) for name in names)


def test_the_command_runs_in_an_empty_environment(environment, tmp_path):
    version = distribution("vlm-prune").version
    for arguments, said in (
        (["--version"], version),
        (["eval", "--method", "zoo-exact", "--budget", "64", "--limit", "6"], "retained"),
    ):
        done = subprocess.run(
            [environment / "vlm-prune", *arguments],
            cwd=tmp_path, check=False, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0 and said in done.stdout, done.stdout + done.stderr


def test_every_module_that_needs_no_extra_is_imported(environment, tmp_path):
    done = subprocess.run(
        [environment / "python", "-c", MODULES],
        cwd=tmp_path, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
