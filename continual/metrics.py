"""What a stream's accuracy matrix says: Transfer, Average, Last and Forgetting, with intervals.

Transfer, Average and Last as in ZSCL (https://arxiv.org/abs/2303.06628). The matrix is indexed
explicitly, so that an accuracy of exactly 0 counts like any other. The zero-shot row is kept
apart: it is measured before the first task, under the same prompts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from rich.box import SIMPLE_HEAD
from rich.table import Table

from vlm_prune.continual.clip import extra
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.files import atomic_path, write_json

Array = NDArray[np.float64]
METRICS = ("transfer", "average", "last", "forgetting", "forgetting_from_best", "incremental")


def transfer(matrix: ArrayLike) -> Array:
    """Returns the mean accuracy on each task but the first before it is learned.

    Args:
        matrix: (..., T, T); row t holds the accuracies after learning task t.

    Returns:
        (..., T - 1)
    """
    a = _square(matrix)
    return np.stack([a[..., :i, i].mean(-1) for i in range(1, a.shape[-1])], -1)


def average(matrix: ArrayLike) -> Array:
    """Returns the mean accuracy on each task over all steps, also those
    before it is learned, (..., T).
    """
    means: Array = _square(matrix).mean(-2)
    return means


def last(matrix: ArrayLike) -> Array:
    """Returns the accuracy on each task after the last one, (..., T)."""
    return _square(matrix)[..., -1, :]


def forgetting(matrix: ArrayLike) -> Array:
    """Returns what each task but the last loses after it is learned, a_ii - a_Ti, (..., T - 1)."""
    a = _square(matrix)
    return np.diagonal(a, axis1=-2, axis2=-1)[..., :-1] - a[..., -1, :-1]


def forgetting_from_best(matrix: ArrayLike) -> Array:
    """Returns what each task but the last loses from its best accuracy before
    the last step, (..., T - 1).
    """
    a = _square(matrix)
    lost: Array = a[..., :-1, :-1].max(-2) - a[..., -1, :-1]
    return lost


def incremental(matrix: ArrayLike) -> Array:
    """Returns after each task the mean accuracy on the tasks learned so far, (..., T).

    Its mean is the average incremental accuracy of class-incremental learning, where tasks have
    equally many test images.
    """
    a = _square(matrix)
    return np.stack([a[..., t, : t + 1].mean(-1) for t in range(a.shape[-1])], -1)


def summary(matrix: ArrayLike) -> dict[str, Array]:
    """Returns each of `METRICS` as the mean over its tasks, (...,); with
    one task only Average and Last.
    """
    a = _square(matrix)
    kinds = {"transfer": transfer, "average": average, "last": last, "forgetting": forgetting,
             "forgetting_from_best": forgetting_from_best, "incremental": incremental}  # fmt: skip
    alone = ("average", "last", "incremental")
    return {
        name: np.asarray(kinds[name](a).mean(-1))
        for name in METRICS
        if a.shape[-1] > 1 or name in alone
    }


@dataclass(frozen=True)
class AccuracyMatrix:
    """Which test images a model gets right after each task.

    Args:
        names: of the T tasks, in order.
        hits: for each task's test set (T, n) of 0 and 1, row t after learning task t.
        zero_shot: for each task's test set (n,) before the first task, under the same prompts.

    Raises:
        InputError: if shapes or names do not fit together, or a test set is empty.
    """

    names: tuple[str, ...]
    hits: tuple[NDArray[np.uint8], ...]
    zero_shot: tuple[NDArray[np.uint8], ...] | None = None

    def __post_init__(self) -> None:
        count = len(self.names)
        if count == 0 or len(set(self.names)) < count:
            raise InputError(f"give at least one task, each under its own name, not {self.names}")
        if len(self.hits) != count or (self.zero_shot and len(self.zero_shot) != count):
            raise InputError(f"{count} names need the hits of {count} test sets")
        for number, (name, hits) in enumerate(zip(self.names, self.hits, strict=True)):
            if hits.ndim != 2 or len(hits) != count or hits.shape[1] == 0:
                raise InputError(f"hits of {name} must be ({count}, n > 0), not {hits.shape}")
            if self.zero_shot and self.zero_shot[number].shape != hits.shape[1:]:
                raise InputError(f"zero-shot hits of {name} must be {hits.shape[1:]}")

    @property
    def values(self) -> Array:
        """Returns the accuracies in [0, 1], (T, T)."""
        return np.stack([hits.mean(1) for hits in self.hits], 1)

    @property
    def zero_shot_values(self) -> Array | None:
        """Returns the accuracies before the first task, (T,); None where they were not measured."""
        if self.zero_shot is None:
            return None
        return np.array([hits.mean() for hits in self.zero_shot])

    def intervals(self, draws: int = 2000, seed: int = 0) -> dict[str, tuple[float, float]]:
        """Returns the 95 % bootstrap interval of each metric.

        Test images are resampled within their data set, the same ones for every row. The interval
        is that of this run's test images, not of other seeds.
        """
        rng = np.random.default_rng(seed)
        columns = [bootstrap_means(hits, draws, rng) for hits in self.hits]
        found = summary(np.stack(columns, -1))
        return {name: _interval(values) for name, values in found.items()}

    def to_json(self) -> dict[str, Any]:
        """Returns accuracies, zero-shot row, metrics and intervals, as plain numbers."""
        values, zero = self.values, self.zero_shot_values
        limits = self.intervals()
        return {
            "tasks": list(self.names),
            "test_images": [hits.shape[1] for hits in self.hits],
            "zero_shot": None if zero is None else zero.tolist(),
            "accuracy": values.tolist(),
            "metrics": {
                name: {"value": float(value), "ci": list(limits[name])}
                for name, value in summary(values).items()
            },
        }

    def write(self, path: Path) -> None:
        """Writes `to_json()`, whole or not at all."""
        write_json(path, self.to_json())

    def table(self) -> Table:
        """Returns a table for a terminal: zero-shot, one row per learned task,
        and the metrics, in per cent.
        """
        values, zero = self.values, self.zero_shot_values
        limits = self.intervals()
        lines = [
            f"{name.replace('_', ' ')} {100 * value:.1f} "
            f"[{100 * limits[name][0]:.1f}, {100 * limits[name][1]:.1f}]"
            for name, value in summary(values).items()
        ]
        table = Table(title="accuracy %", caption="\n".join(lines), box=SIMPLE_HEAD)
        table.add_column("after", no_wrap=True)
        for name in (*self.names, "mean"):
            table.add_column(name, overflow="fold", min_width=5)
        rows = [] if zero is None else [("zero-shot", zero)]
        for label, row in [*rows, *zip(self.names, values, strict=True)]:
            table.add_row(label, *(f"{100 * v:.1f}" for v in row), f"{100 * row.mean():.1f}")
        return table

    def heat_map(self, path: Path) -> None:
        """Draws the matrix, zero-shot row first, as a PNG, SVG or PDF.

        Raises:
            InputError: if matplotlib is missing.
        """
        figures = extra("matplotlib.figure")
        zero = self.zero_shot_values
        values = self.values if zero is None else np.vstack([zero, self.values])
        rows = list(self.names) if zero is None else ["zero-shot", *self.names]
        side = 1.5 + 0.55 * len(self.names)
        figure = figures.Figure(figsize=(side + 1, side), layout="constrained")
        axes = figure.subplots()
        picture = axes.imshow(100 * values, cmap="viridis", vmin=0, vmax=100)
        axes.set_xticks(range(len(self.names)), self.names, rotation=60, ha="right")
        axes.set_yticks(range(len(rows)), rows)
        axes.set_xlabel("tested on")
        axes.set_ylabel("after learning")
        for y, x in np.ndindex(values.shape):
            ink = "white" if values[y, x] < 0.6 else "black"
            label = f"{100 * values[y, x]:.0f}"
            axes.text(x, y, label, ha="center", va="center", color=ink, fontsize=8)
        figure.colorbar(picture, label="accuracy %")
        with atomic_path(path) as partial:
            figure.savefig(partial, format=path.suffix[1:])


def retention(before: ArrayLike, after: ArrayLike, draws: int = 2000) -> dict[str, Any]:
    """Returns what is left of the accuracy on a data set that no task contains.

    Args:
        before: (n,) hits of the original model.
        after: (n,) hits of the same images, under the same prompts, after the stream.
        draws: bootstrap samples.

    Returns:
        Both accuracies, and their difference with a 95 % interval paired by image.

    Raises:
        InputError: if the two do not have the same images.
    """
    old, new = np.asarray(before), np.asarray(after)
    if old.shape != new.shape or old.ndim != 1 or old.size == 0:
        raise InputError(f"retention compares the same images; got {old.shape} and {new.shape}")
    drawn = bootstrap_means(np.stack([old, new]), draws, np.random.default_rng(0))
    return {
        "before": float(old.mean()),
        "after": float(new.mean()),
        "difference": float(new.mean() - old.mean()),
        "ci": list(_interval(drawn[:, 1] - drawn[:, 0])),
    }


def drift(before: Mapping[str, Any], after: Mapping[str, Any]) -> float:
    """Returns the Frobenius distance of two state dicts over all floating-point tensors.

    Raises:
        InputError: if their names or shapes differ; merge adapters first.
    """
    shapes = [{n: tuple(t.shape) for n, t in state.items()} for state in (before, after)]
    if shapes[0] != shapes[1]:
        odd = min(n for n in shapes[0].keys() | shapes[1] if shapes[0].get(n) != shapes[1].get(n))
        raise InputError(f"weights differ in {odd!r}; merge adapters before measuring drift")
    squares = (
        float((after[name].double() - tensor.double()).square().sum())
        for name, tensor in before.items()
        if tensor.is_floating_point()
    )
    return float(sum(squares) ** 0.5)


def bootstrap_means(hits: ArrayLike, draws: int, rng: np.random.Generator) -> Array:
    """Returns bootstrap means of each row of `hits`, the same images in every row, (draws, R).

    Images with one pattern of hits are exchangeable, so that counts of patterns are drawn.

    Args:
        hits: right (1) or wrong (0), (R, n).
        draws: bootstrap samples.
        rng: draws them.
    """
    rows = np.asarray(hits)
    # how often each pattern of right and wrong is drawn, instead of every image: far fewer numbers
    patterns, counts = np.unique(rows, axis=1, return_counts=True)
    total = rows.shape[1]
    drawn = rng.multinomial(total, counts / total, size=draws)
    means: Array = drawn @ patterns.T.astype(np.float64) / total
    return means


def mean_accuracy(hits: Sequence[int] | ArrayLike, draws: int = 2000) -> tuple[float, float, float]:
    """Returns the mean of 0/1 hits (n,), and the ends of its 95 % interval."""
    row = np.asarray(hits)
    low, high = _interval(bootstrap_means(row[None], draws, np.random.default_rng(0))[:, 0])
    return float(row.mean()), low, high


def _interval(values: Array) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _square(matrix: ArrayLike) -> Array:
    a = np.asarray(matrix, np.float64)
    if a.ndim < 2 or a.shape[-1] != a.shape[-2] or a.shape[-1] == 0:
        raise InputError(f"an accuracy matrix is (T, T), not {a.shape}")
    if not np.isfinite(a).all():
        raise InputError("the accuracy matrix has gaps; measure every task after every task")
    return a
