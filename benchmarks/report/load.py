"""Run folders as `vlm-prune eval` and `compare` leave them, checked before anything is drawn."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from vlm_prune.benchmarks.evaluation.records import PairedRow, Results
from vlm_prune.benchmarks.evaluation.store import CONFIG, CONTENT_OF_KIND, kind_of, read_run
from vlm_prune.benchmarks.evaluation.tables import method_name
from vlm_prune.vlm.budget import tokens_for
from vlm_prune.vlm.common.errors import InputError


@dataclass(frozen=True)
class Run:
    """A finished run: one method at one budget.

    Args:
        label: the method, with hyperparameters that are not its defaults.
        method: its name.
        budget: as it was given.
        tokens: image tokens that the budget asks for.
        shared: what all runs of one report have in common: the configuration less the method.
        rows: of all questions.
    """

    path: Path
    label: str
    method: str
    budget: int | float | str
    tokens: int
    results: Results
    shared: dict[str, Any]
    rows: list[PairedRow]

    @property
    def computed(self) -> float:
        """Returns the image tokens per image that a decoder layer
        computes, the mean over layers.
        """
        return self.results.tokens.layer_mean


def load_runs(paths: list[Path]) -> list[Run]:
    """Returns the runs of the folders, each a run or a folder of runs, in order of budget.

    Raises:
        InputError: if a folder holds no run, an unfinished or unreadable one or one of another
            version, or if the runs are not of the same questions, model and settings.
    """
    folders = dict.fromkeys(folder.resolve() for path in paths for folder in run_folders(path))
    runs = [load_run(folder) for folder in folders]
    first, seen = runs[0], dict[tuple[str, int | float | str], Path]()
    for run in runs:
        other = [key for key in first.shared if run.shared.get(key) != first.shared[key]]
        if other:
            raise InputError(
                f"{first.path} and {run.path} differ in {', '.join(other)}; report them apart"
            )
        unpruned = [r.results.overall.baseline_accuracy for r in (first, run)]
        if unpruned[0] != unpruned[1]:
            raise InputError(
                f"{first.path} and {run.path} differ in the unpruned model's accuracy, so in its "
                "weights; report them apart"
            )
        earlier = seen.setdefault((run.label, run.budget), run.path)
        if earlier is not run.path:
            raise InputError(
                f"{earlier} and {run.path} both hold {run.label} at budget {run.budget}; give one"
            )
    return sorted(runs, key=lambda run: run.tokens)


def run_folders(path: Path) -> list[Path]:
    """Returns `path` itself if it holds a run, else the runs in it."""
    if not path.is_dir():
        raise InputError(f"{path} is no folder; give the --output of vlm-prune eval or compare")
    kind = kind_of(path)
    if kind == "eval":
        return [path]
    if kind not in (None, "compare"):
        raise InputError(
            f"{path} holds {CONTENT_OF_KIND[str(kind)]}; give the --output of eval or compare"
        )
    found = sorted(file.parent for file in path.glob(f"*/{CONFIG}"))
    found = [folder for folder in found if kind_of(folder) == "eval"]
    if not found:
        raise InputError(f"{path} holds no run; give the --output of vlm-prune eval or compare")
    return found


def load_run(path: Path) -> Run:
    """Reads one run folder; raises `InputError` as `read_run` does."""
    results, rows = read_run(path)
    shared: dict[str, Any] = msgspec.to_builtins(results.config)
    del shared["variant"]
    variant = results.config.variant
    arguments = {k: v for k, v in variant.arguments.items() if not k.endswith("schedule")}
    if variant.positions != "auto":
        arguments["positions"] = variant.positions
    named = ", ".join(f"{key}={value}" for key, value in arguments.items())
    name = method_name(variant, results.definition)
    return Run(
        path,
        f"{name} ({named})" if named else name,
        variant.method,
        variant.budget,
        tokens_for(variant.budget, int(results.tokens.full)),
        results,
        shared,
        rows,
    )
