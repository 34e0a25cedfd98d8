"""The same commands run from two commits of this repository in turn: time, memory and results."""

import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.records import read_record

ROOT = Path(__file__).resolve().parents[2]
DEFAULT = ("eval --method zoo --budget 64", "bench --method zoo --budget 64")
PHASES = ("vision", "selection", "prefill", "decode")
# Runs a command and writes what it took. A process's peak memory counts what its parent held when it
# was started: the parent is this small one.
LAUNCHER = """
import json, os, subprocess, sys, time
start = time.perf_counter()
child = subprocess.Popen(sys.argv[1:])
_, status, used = os.wait4(child.pid, 0)
wall, code = time.perf_counter() - start, os.waitstatus_to_exitcode(status)
peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
took = dict(wall_s=wall, cpu_s=used.ru_utime + used.ru_stime, peak_bytes=peak)
if code == 0:
    print(json.dumps(took), file=sys.stderr)
os._exit(code if code >= 0 else 1)
"""
COMPARED = ("baseline", "prediction", "kept")


@dataclass(frozen=True)
class Tree:
    """A checkout and the commit that it has."""

    folder: Path
    commit: str

    def program(self) -> list[str]:
        """Returns what runs its `vlm-prune`, under the interpreter of this process.

        Raises:
            InputError: if the commit has no such command.
        """
        try:
            text = (self.folder / "pyproject.toml").read_text()
            module, function = tomllib.loads(text)["project"]["scripts"]["vlm-prune"].split(":")
            (self.folder / ".typing/vlm_prune").resolve(strict=True)
        except (OSError, KeyError, ValueError) as error:
            raise InputError(
                f"commit {self.commit} has no command vlm-prune; give a later one"
            ) from error
        code = (
            f"import sys; sys.argv[0] = 'vlm-prune'; from {module} import {function} as run; run()"
        )
        return [sys.executable, "-c", code]

    def environment(self) -> dict[str, str]:
        """Returns variables with which `vlm_prune` is imported from this tree, installed or not."""
        paths = [str(self.folder / ".typing"), os.environ.get("PYTHONPATH", "")]
        return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


@dataclass
class CommandCost:
    """What a command took: seconds by the clock and of the processors, the most bytes, and
    milliseconds of the phases of `generate` where it measures them.
    """

    wall_s: float
    cpu_s: float
    peak_bytes: int
    phases_ms: dict[str, float] = field(default_factory=dict)
    rows: dict[str, Any] = field(default_factory=dict)

    def measures(self) -> dict[str, float]:
        """Returns all of it by name."""
        whole = {"wall s": self.wall_s, "cpu s": self.cpu_s, "peak MB": self.peak_bytes / 1e6}
        return whole | {f"{phase} ms": value for phase, value in self.phases_ms.items()}


def git(*words: str) -> str:
    """Returns what git says in this repository.

    Raises:
        InputError: if this is no checkout, or git is not installed or refuses.
    """
    if not (ROOT / ".git").exists():
        raise InputError("commits are compared in a git checkout of this repository; clone it")
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise InputError("commits are compared with git; install it") from None
    except subprocess.CalledProcessError as error:
        raise InputError(f"git {words[0]}: {error.stderr.strip() or 'it failed'}") from error
    return done.stdout.strip()


def commit_of(name: str) -> str:
    """Returns the short hash of a commit.

    Raises:
        InputError: if there is none of that name.
    """
    try:
        whole = git("rev-parse", "--verify", "--end-of-options", f"{name}^{{commit}}")
    except InputError as error:
        if str(error).startswith("git rev-parse"):
            raise InputError(f"no such commit: {name!r}; git log names them") from error
        raise
    return whole[:9]


@contextmanager
def worktree(name: str) -> Iterator[Tree]:
    """Makes a temporary checkout of a commit, which goes when the block ends."""
    commit = commit_of(name)
    with tempfile.TemporaryDirectory(prefix="vlm-prune-") as folder:
        path = Path(folder) / "tree"
        git("worktree", "add", "--quiet", "--detach", str(path), commit)
        try:
            yield Tree(path, commit)
        finally:
            git("worktree", "remove", "--force", str(path))


def words_of(command: str) -> list[str]:
    """Returns the arguments of a command of `vlm-prune`.

    Raises:
        InputError: if there are none, or a quote is open.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        reason = str(error).lower()
        raise InputError(
            f"--run {command!r}: {reason}; give each quotation mark its second"
        ) from error
    if not words:
        raise InputError("--run is empty; give a command such as 'eval --method zoo'")
    return words


def run_once(tree: Tree, command: str) -> CommandCost:
    """Runs a command of `vlm-prune` in a process of its own, from a tree.

    Raises:
        InputError: if it fails.
    """
    words = words_of(command)
    with tempfile.TemporaryDirectory(prefix="vlm-prune-") as folder:
        measured = words[:1] in (["eval"], ["bench"])
        output = ["--output", str(Path(folder) / "out")] if measured else []
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", LAUNCHER, *tree.program(), *words, *output],
            cwd=folder, env=tree.environment(), check=False,
            capture_output=True, text=True, errors="replace",
        )  # fmt: skip
        lines = done.stderr.strip().splitlines()
        if done.returncode:
            raise InputError(f"{tree.commit}: vlm-prune {command}: {' '.join(lines[-1:])}")
        run = CommandCost(**json.loads(lines[-1]))
        if measured:
            read_output(Path(folder) / "out", run)
    return run


class WrittenTiming(msgspec.Struct):
    """The part of a `Timing` that is compared."""

    median: float


class WrittenTimes(msgspec.Struct):
    """The part of `ModelTimes` that is compared."""

    times_ms: dict[str, WrittenTiming]


class WrittenBench(msgspec.Struct):
    """The part of a `bench.json` that is compared, of whichever version the commit has."""

    pruned: WrittenTimes


def read_output(folder: Path, run: CommandCost) -> None:
    """Adds what `eval` or `bench` wrote to what its process took."""
    if (bench := folder / "bench.json").exists():
        content: Any = read_record(bench, list[WrittenBench] | WrittenBench, "run other commands")  # type: ignore[arg-type]
        written: WrittenBench = content[0] if isinstance(content, list) else content
        run.phases_ms = {phase: written.pruned.times_ms[phase].median for phase in PHASES}
        return
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    run.rows = {row["id"]: row for row in rows}
    run.phases_ms = {phase: median(row["time_ms"][phase] for row in rows) for phase in PHASES}


def differences(before: CommandCost, now: CommandCost) -> dict[str, int]:
    """Returns how many questions both answered, and in how many of them each result differs."""
    both = before.rows.keys() & now.rows.keys()
    return {"questions": len(both)} | {
        name: sum(before.rows[i].get(name) != now.rows[i].get(name) for i in both)
        for name in COMPARED
    }


def compare_with(commit: str, commands: list[str], repeats: int) -> dict[str, Any]:
    """Runs commands from a commit and from this tree in turn; returns medians and their ratios.

    Args:
        commit: the older one, by any name that git knows.
        commands: of `vlm-prune`, without its name.
        repeats: measured runs of each, after one that fills the disk's cache.

    Raises:
        InputError: if there is no such commit, this is no git checkout, or a command fails.
    """
    for command in commands:
        words_of(command)
    results = []
    with worktree(commit) as before:
        changed = "+changes" if git("status", "--porcelain", "--untracked-files=no") else ""
        now = Tree(ROOT, commit_of("HEAD") + changed)
        for command in commands:
            runs: dict[str, list[CommandCost]] = {"before": [], "now": []}
            for _ in range(repeats + 1):
                for name, tree in (("before", before), ("now", now)):
                    runs[name].append(run_once(tree, command))
            medians = {name: medians_of(several[1:]) for name, several in runs.items()}
            results.append(
                {
                    "command": f"vlm-prune {command}",
                    **medians,
                    "ratio": {
                        measure: value / medians["before"][measure]
                        for measure, value in medians["now"].items()
                        if medians["before"].get(measure)
                    },
                    "differing": differences(runs["before"][-1], runs["now"][-1]),
                }
            )
    return {
        "commits": {"before": before.commit, "now": now.commit},
        "machine": machine(),
        "repeats": repeats,
        "results": results,
    }


def medians_of(runs: list[CommandCost]) -> dict[str, float]:
    """Returns the median of each measure over runs."""
    rows = [run.measures() for run in runs]
    return {name: median(row[name] for row in rows) for name in rows[0]}


def machine() -> dict[str, str]:
    """Returns the processor, how many may be used, the threads asked for and Python's version."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "processor": model,
        "processors": str(os.cpu_count()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "not set"),
        "python": platform.python_version(),
    }


def comparison_rows(found: dict[str, Any]) -> list[list[str]]:
    """Returns the table of a comparison: its header, then a row for each measure of each command."""
    commits = found["commits"]
    rows = [["command", "measure", commits["before"], commits["now"], "ratio"]]
    for result in found["results"]:
        shown = result["command"]
        for measure, value in result["now"].items():
            before, ratio = result["before"].get(measure), result["ratio"].get(measure)
            old = "–" if before is None else f"{before:.3f}"
            rows.append(
                [shown, measure, old, f"{value:.3f}", "–" if ratio is None else f"{ratio:.2f}x"]
            )
            shown = ""
        if questions := result["differing"]["questions"]:
            others = ", ".join(f"{name} {result['differing'][name]}" for name in COMPARED)
            rows.append(["", f"of {questions} rows differ in", "", others, ""])
    return rows
