"""Run folders as `vlm-prune eval` and `compare` leave them, checked before anything is drawn."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_prune.benchmarks.stats.table import method_name
from vlm_prune.vlm.budget import tokens_for
from vlm_prune.vlm.common.errors import InputError


@dataclass(frozen=True)
class Row:
    """One question with the unpruned and the pruned answer.

    `kept` holds the token places left of each image after the last cut, `sizes` how many it had,
    `grids` their rows and columns where they lie in one grid; None in runs that did not note them.
    Of `cropped` images the model sees the square in the middle.
    """

    id: str
    task: str
    question: str
    gold: str
    baseline: str
    prediction: str
    baseline_right: bool
    right: bool
    kept: list[list[int]] | None
    sizes: list[int] | None
    grids: list[list[int] | None] | None
    images: int
    cropped: bool

    @property
    def broken(self) -> bool:
        """Whether pruning turned a right answer into a wrong one."""
        return self.baseline_right and not self.right

    @property
    def mended(self) -> bool:
        """Whether pruning turned a wrong answer into a right one."""
        return self.right and not self.baseline_right


@dataclass(frozen=True)
class Run:
    """A finished run: one method at one budget.

    Args:
        label: the method, with hyperparameters that are not its defaults.
        tokens: image tokens that the budget asks for.
        results: `results.json`.
        shared: what all runs of one report have in common: the configuration less the method.
    """

    path: Path
    label: str
    method: str
    budget: int | float
    tokens: int
    results: dict[str, Any]
    shared: dict[str, Any]
    rows: list[Row]

    @property
    def computed(self) -> float:
        """Image tokens per image that a decoder layer computes, the mean over layers."""
        return float(self.results["tokens"]["layer_mean"])


def load_runs(paths: list[Path]) -> list[Run]:
    """The runs of the folders, each a run or a folder of runs, in order of budget.

    Raises:
        InputError: if a folder holds no run, an unfinished or unreadable one or one of another
            version, or if the runs are not of the same questions, model and settings.
    """
    folders = dict.fromkeys(folder.resolve() for path in paths for folder in run_folders(path))
    runs = [load_run(folder) for folder in folders]
    first, seen = runs[0], dict[tuple[str, float], Path]()
    for run in runs:
        other = [key for key in first.shared if run.shared.get(key) != first.shared[key]]
        if other:
            raise InputError(
                f"{first.path} and {run.path} differ in {', '.join(other)}; report them apart"
            )
        unpruned = [r.results["overall"]["baseline_accuracy"] for r in (first, run)]
        if unpruned[0] != unpruned[1]:
            raise InputError(
                f"{first.path} and {run.path} differ in the unpruned model's accuracy, so in its "
                "weights; report them apart"
            )
        twin = seen.setdefault((run.label, run.budget), run.path)
        if twin is not run.path:
            raise InputError(
                f"{twin} and {run.path} both hold {run.label} at budget {run.budget}; give one"
            )
    return sorted(runs, key=lambda run: run.tokens)


def run_folders(path: Path) -> list[Path]:
    """`path` itself if it holds a run, else the runs in it."""
    if not path.is_dir():
        raise InputError(f"{path} is no folder; give the --output of vlm-prune eval or compare")
    found = [path] if (path / "config.json").is_file() else []
    results = path / "results.json"
    if not found and results.is_file() and "suite" in _json(results):
        raise InputError(
            f"{path} holds a suite, which prints its own table; give a run or compare's"
        )
    found = found or sorted(config.parent for config in path.glob("*/config.json"))
    if not found:
        raise InputError(f"{path} holds no run; give the --output of vlm-prune eval or compare")
    return found


def load_run(path: Path) -> Run:
    """One run folder."""
    if not (path / "results.json").is_file():
        raise InputError(
            f"{path} holds an unfinished run; the same command with the same --output finishes it"
        )
    results, log = _json(path / "results.json"), path / "samples.jsonl"
    lines = [_parsed(line, log) for line in _text(log).splitlines()]
    try:
        shared = dict(results["config"])
        variant = shared.pop("variant")
        budget = variant["budget"]
        arguments = variant["arguments"]
        if variant["positions"] != "auto":
            arguments = arguments | {"positions": variant["positions"]}
        named = ", ".join(
            f"{key}={value}" for key, value in arguments.items() if not key.endswith("schedule")
        )
        name = method_name(results)
        rows = [_row(line) for line in lines]
        _check(results, rows)
        return Run(
            path,
            f"{name} ({named})" if named else name,
            str(variant["method"]),
            budget,
            tokens_for(budget, int(results["tokens"]["full"])),
            results,
            shared,
            rows,
        )
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} is a run of another version ({type(error).__name__}: {error}); "
            "run it again with this one"
        ) from error


def _row(line: dict[str, Any]) -> Row:
    kept = line.get("kept")
    return Row(
        id=str(line["id"]),
        task=str(line["task"]),
        question=str(line["question"]),
        gold=str(line["answer"]),
        baseline=str(line["baseline"]),
        prediction=str(line["prediction"]),
        baseline_right=float(line["baseline_score"]) >= 0.5,
        right=float(line["score"]) >= 0.5,
        kept=None if kept is None else [[int(place) for place in image] for image in kept],
        sizes=line.get("image_tokens"),
        grids=line.get("grids"),
        images=int(line.get("images", 0)),
        cropped=bool(line.get("cropped")),
    )


def _check(results: dict[str, Any], rows: list[Row]) -> None:
    """Raises what a missing part raises, or `ValueError` for rows that are not all there."""
    for entry in (results["overall"], *results["tasks"].values()):
        [float(entry[key]) for key in ("accuracy", "baseline_accuracy")]
        float(entry["retained"] or 0)
        _, _ = map(float, entry["ci"] or (0, 0))
    for part, keys in (
        ("tokens", ("full", "layer_mean")),
        ("speedup", ("prefill", "end_to_end")),
        ("time_ms", ("vision", "selection", "prefill", "decode")),
        ("time_ms", ("baseline_vision", "baseline_prefill", "baseline_decode")),
        ("flops", ("baseline", "pruned")),
    ):
        [float(results[part][key]) for key in keys]
    for row in rows:
        kept = row.kept or []
        sizes = row.sizes if row.sizes is not None else [int(results["tokens"]["full"])] * len(kept)
        for image, full in zip(kept, sizes if kept else [], strict=True):
            if any(not 0 <= place < full for place in image):
                raise ValueError(f"{row.id} keeps a token outside the {full} of an image")
        for grid, full in zip(row.grids or [], sizes, strict=bool(row.grids)):
            if grid is not None and math.prod(grid) != full:
                raise ValueError(f"{row.id} has a grid of {grid} for the {full} tokens of an image")
    expected = sum(int(task["n"]) for task in results["tasks"].values())
    if len(rows) != expected:
        raise ValueError(f"{len(rows)} rows for {expected} questions")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path} is missing; run it again") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not text; run it again") from None


def _json(path: Path) -> dict[str, Any]:
    return _parsed(_text(path), path)


def _parsed(text: str, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}); run it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no JSON object; run it again")
    return content
