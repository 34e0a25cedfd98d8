"""Methods over seeds: metrics with intervals, paired differences, a table and a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlm_prune.benchmarks.stats.bootstrap import Values, percentiles, resampled
from vlm_prune.continual.clip import extra
from vlm_prune.continual.metrics import AccuracyMatrix, summary

Runs = Mapping[int, AccuracyMatrix]  # by seed


def values(runs: Runs) -> dict[str, list[float]]:
    """Returns each metric of each seed, in per cent."""
    found = [summary(one.values) for one in runs.values()]
    return {name: [100 * float(row[name]) for row in found] for name in found[0]}


def figures(runs: Runs) -> dict[str, dict[str, float]]:
    """Returns the mean over seeds of each metric with its 95 % interval, in per cent.

    The interval is of seeds and test images: both are drawn again. With one seed it is of the
    test images alone.
    """
    drawn = _drawn([runs])
    return {n: _figure(np.array(v), drawn[n][0]) for n, v in values(runs).items()}


def metric_differences(one: Runs, other: Runs) -> dict[str, dict[str, float]]:
    """Returns the first's metrics minus the second's over their common
    seeds, paired by seed and image.
    """
    seeds = [seed for seed in one if seed in other]
    if not seeds:
        return {}
    pair = [{seed: runs[seed] for seed in seeds} for runs in (one, other)]
    drawn = _drawn(pair)
    first, second = (values(runs) for runs in pair)
    return {
        name: _figure(np.array(first[name]) - np.array(second[name]), d[0] - d[1])
        for name, d in drawn.items()
    }


def _drawn(methods: Sequence[Runs]) -> dict[str, Values]:
    """Returns bootstrap draws of each metric, mean over drawn seeds,
    (methods, DRAWS), in per cent.
    """
    matrices = [one for runs in methods for one in runs.values()]
    tasks, seeds = len(matrices[0].names), len(methods[0])
    # of each task the rows of all runs, (methods x seeds x steps, images)
    hits = [np.concatenate([one.hits[number] for one in matrices]) for number in range(tasks)]
    names = list(summary(matrices[0].values))

    def means(chosen: NDArray[np.int64], *images: NDArray[np.int64]) -> Values:
        # (draws, methods, seeds, tasks, tasks): row t after task t, column i of task i's images
        columns = [
            _means(rows, drawn).reshape(-1, len(methods), seeds, tasks)
            for rows, drawn in zip(hits, images, strict=True)
        ]
        metrics = summary(np.stack(columns, -1))
        # the seeds that were drawn, averaged: (methods, draws) of each metric
        picked = [
            np.take_along_axis(metrics[name], chosen[:, None], 2).mean(-1).T for name in names
        ]
        return 100 * np.stack(picked)

    values = resampled(means, [seeds, *(rows.shape[1] for rows in hits)])
    return dict(zip(names, values, strict=True))


def _means(rows: NDArray[np.uint8], drawn: NDArray[np.int64]) -> Values:
    """Returns means (D, R) of rows (R, n) over images that are drawn, (D, n)."""
    draws, images = drawn.shape
    # how often each image is drawn, with one run of numbers for each draw
    indices = drawn + images * np.arange(draws)[:, None]
    counts = np.bincount(indices.ravel(), minlength=draws * images).reshape(draws, images)
    means: Values = counts @ rows.T.astype(np.float64) / images
    return means


def _figure(seeds: Values, drawn: Values) -> dict[str, float]:
    low, high = percentiles(drawn)
    return {"value": float(seeds.mean()), "low": low, "high": high}


def cell(figure: Mapping[str, float], sign: str = "") -> str:
    """Formats a figure as `61.0 [59.2, 62.9]`."""
    value, low, high = (format(figure[key], f"{sign}.1f") for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def draw_comparison(rows: Mapping[str, Mapping[str, Mapping[str, float]]], path: Path) -> None:
    """Draws Transfer against Last of every method with both intervals, as a picture."""
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
