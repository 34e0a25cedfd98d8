"""Methods over seeds: metrics with intervals, paired differences, a table and a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_prune.continual.clip import extra
from vlm_prune.continual.metrics import AccuracyMatrix, bootstrap_means, summary

Array = NDArray[np.float64]
Runs = Mapping[int, AccuracyMatrix]  # by seed
DRAWS = 2000


def values(runs: Runs) -> dict[str, list[float]]:
    """Each metric of each seed, in per cent."""
    found = [summary(one.values) for one in runs.values()]
    return {name: [100 * float(row[name]) for row in found] for name in found[0]}


def figures(runs: Runs) -> dict[str, dict[str, float]]:
    """Mean over seeds of each metric with its 95 % interval, in per cent.

    The interval is of seeds and test images: both are drawn again. With one seed it is of the
    test images alone.
    """
    drawn = _drawn([runs])
    return {n: _figure(np.array(v), drawn[n][..., 0]) for n, v in values(runs).items()}


def metric_differences(one: Runs, other: Runs) -> dict[str, dict[str, float]]:
    """The first's metrics minus the second's over their common seeds, paired by seed and image."""
    seeds = [seed for seed in one if seed in other]
    if not seeds:
        return {}
    pair = [{seed: runs[seed] for seed in seeds} for runs in (one, other)]
    drawn = _drawn(pair)
    first, second = (values(runs) for runs in pair)
    return {
        name: _figure(np.array(first[name]) - np.array(second[name]), d[..., 0] - d[..., 1])
        for name, d in drawn.items()
    }


def _drawn(methods: Sequence[Runs]) -> dict[str, Array]:
    """Bootstrap draws of each metric, mean over drawn seeds, (DRAWS, methods), in per cent."""
    rng = np.random.default_rng(0)
    matrices = [one for runs in methods for one in runs.values()]
    tasks, seeds = len(matrices[0].names), len(methods[0])
    columns = []
    for number in range(tasks):
        rows = np.concatenate([one.hits[number] for one in matrices])
        drawn = bootstrap_means(rows, DRAWS, rng)
        columns.append(drawn.reshape(DRAWS, len(methods), seeds, tasks))
    chosen = rng.integers(seeds, size=(DRAWS, 1, seeds))
    return {
        name: 100 * np.take_along_axis(metric, chosen, 2).mean(-1)
        for name, metric in summary(np.stack(columns, -1)).items()
    }


def _figure(seeds: Array, drawn: Array) -> dict[str, float]:
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {"value": float(seeds.mean()), "low": float(low), "high": float(high)}


def cell(figure: Mapping[str, float], sign: str = "") -> str:
    """`61.0 [59.2, 62.9]`."""
    value, low, high = (format(figure[key], f"{sign}.1f") for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown."""
    lines: list[Sequence[Any]] = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(str(c) for c in line)} |\n" for line in lines)


def draw_comparison(rows: Mapping[str, Mapping[str, Mapping[str, float]]], path: Path) -> None:
    """Transfer against Last of every method with both intervals, as a picture."""
    figure = extra("matplotlib.figure").Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    for number, (label, found) in enumerate(rows.items()):
        x, y = found["transfer"], found["last"]
        reach = [[[f["value"] - f["low"]], [f["high"] - f["value"]]] for f in (x, y)]
        axes.errorbar(
            x["value"], y["value"], xerr=reach[0], yerr=reach[1], label=label,
            fmt="osD^v<>phX*dPs"[number % 14], color=f"C{number % 10}", capsize=2,
        )  # fmt: skip
    axes.set_xlabel("Transfer %: tasks not learned yet")
    axes.set_ylabel("Last %: all tasks after the stream")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    figure.savefig(path, format="png")
