"""Our methods beside the released code of others, on random LLaVAs of one shape, in turn."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import IO, Any

import numpy as np

from vlm_prune.benchmarks.evaluation.tables import MISSING_VALUE
from vlm_prune.benchmarks.speed import peer_worker
from vlm_prune.benchmarks.speed.against import machine
from vlm_prune.benchmarks.stats.bootstrap import mean_interval
from vlm_prune.vlm.common.errors import InputError

RELEASES = ("visionzip", "flowcut")
METHODS = ("visionzip", "divprune", "zoo-exact")


@dataclass
class PeerRun:
    """A process that measures one method, and what it gave.

    Args:
        side: `ours` or `released`.
        method: its name; `none` for the unpruned model.
        process: that answers each line.
        errors: what it says otherwise.
        first: processor seconds to the first token.
        encoded: of these, until the image's tokens are there.
        selection: of these, where it is no part of a changed tower.
    """

    side: str
    method: str
    process: subprocess.Popen[str]
    errors: IO[str]
    first: list[float] = field(default_factory=list)
    encoded: list[float] = field(default_factory=list)
    selection: list[float] = field(default_factory=list)

    def answer(self) -> Any:
        """Returns the next line that the process writes.

        Raises:
            InputError: if it ended.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            last = (self.errors.read().strip().splitlines() or ["it ended"])[-1]
            raise InputError(f"{self.side} {self.method}: {last}; see docs/methodology.md")
        return json.loads(line)

    def measure(self) -> None:
        """Measures once more."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # `answer` says why
        first, encoded, selection = self.answer()
        self.first.append(first)
        self.encoded.append(encoded)
        if selection is not None:
            self.selection.append(selection)

    def after(self) -> list[float]:
        """Returns the seconds behind the image's tokens: the language model's prefill."""
        return [first - encoded for first, encoded in zip(self.first, self.encoded, strict=True)]

    def milliseconds(self) -> dict[str, float]:
        """Returns medians: to the first token, until the image's tokens are there, after that, and of
        selection where it was measured.
        """
        named = {"first": self.first, "encoded": self.encoded, "prefill": self.after()}
        if self.selection:
            named["selection"] = self.selection
        return {name: 1000 * median(values) for name, values in named.items()}


@contextmanager
def started(python: Path, budget: int) -> Iterator[list[PeerRun]]:
    """Starts a process for each method, under its own interpreter; they end with the block.

    Args:
        python: the interpreter of the environment that has the releases.
        budget: tokens to keep of an image.

    Raises:
        InputError: if there is no such interpreter.
    """
    names = [("released", name) for name in ("none", *RELEASES)]
    names += [("ours", name) for name in ("none", *METHODS)]
    runs: list[PeerRun] = []
    try:
        for side, method in names:
            program = sys.executable if side == "ours" else str(python)
            words = [program, peer_worker.__file__, side, method, str(budget)]
            errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed with the process
            try:
                process = subprocess.Popen(
                    words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                    text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
                )  # fmt: skip
            except OSError as error:
                raise InputError(
                    f"cannot run {python}: {error.strerror}; give the interpreter of an "
                    "environment with the releases, see docs/methodology.md"
                ) from error
            runs.append(PeerRun(side, method, process, errors))
            runs[-1].answer()
        yield runs
    finally:
        for run in runs:
            run.process.kill()
            run.process.communicate()
            run.errors.close()


def compare_with_peers(python: Path, budget: int, repeats: int) -> dict[str, Any]:
    """Returns processor milliseconds of our methods and of others' releases, measured in turn.

    Each is compared with the unpruned model of its own side, since the two are written differently.

    Args:
        python: the interpreter of the environment that has the releases.
        budget: tokens to keep of an image.
        repeats: of each.

    Raises:
        InputError: if a process does not start or ends.
    """
    with started(python, budget) as runs:
        for _ in range(repeats):
            for run in runs:
                run.measure()
    by_name = {(run.side, run.method): run for run in runs}
    results = []
    for (side, method), run in by_name.items():
        row: dict[str, Any] = {"side": side, "method": method, "ms": run.milliseconds()}
        if method != "none":
            whole = by_name[side, "none"]
            row["speedup"] = {
                "prefill": faster(whole.after(), run.after()),
                "first": faster(whole.first, run.first),
            }
            row["times_ours"] = faster(run.first, by_name["ours", METHODS[0]].first)
        results.append(row)
    shape = {"tower": peer_worker.TOWER, "language": peer_worker.LANGUAGE}
    return {
        "machine": machine(), "budget": budget, "repeats": repeats, "shape": shape,
        "results": results,
    }  # fmt: skip


def faster(slow: list[float], fast: list[float]) -> dict[str, float]:
    """Returns the mean ratio of two runs' times, round by round, with its 95 % interval.

    Args:
        slow: times of the one above the line.
        fast: those of the other.
    """
    ratios = np.array(slow) / np.array(fast)
    low, high = mean_interval(ratios)
    return {"mean": float(ratios.mean()), "low": low, "high": high}


def peer_rows(found: dict[str, Any]) -> list[list[str]]:
    """Returns the table of a comparison: its header, then a row for each method."""
    header = [
        "code", "method", "selection ms", "prefill ms", "speed-up", "first token ms", "speed-up",
        f"times our {METHODS[0]}",
    ]  # fmt: skip
    rows = [header]
    for result in found["results"]:
        took, speedup = result["ms"], result.get("speedup", {})
        rows.append(
            [
                result["side"], result["method"], f"{took['selection']:.1f}" if "selection" in took else MISSING_VALUE,
                f"{took['prefill']:.0f}", ratio_cell(speedup.get("prefill")),
                f"{took['first']:.0f}", ratio_cell(speedup.get("first")), ratio_cell(result.get("times_ours")),
            ]
        )  # fmt: skip
    return rows


def ratio_cell(ratio: dict[str, float] | None) -> str:
    """Returns a ratio and its interval as a cell, a dash for none."""
    if ratio is None:
        return MISSING_VALUE
    return "{mean:.2f}x [{low:.2f}, {high:.2f}]".format(**ratio)
