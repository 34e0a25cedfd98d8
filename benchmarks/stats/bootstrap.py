"""Bootstrap intervals: of an accuracy, and of the paired ratio of two, stratified by task."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Scores = Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]]


def retained(
    scores: Scores, draws: int = 2000, seed: int = 0
) -> tuple[float | None, list[float] | None]:
    """Mean pruned over mean unpruned accuracy, with a 95 % interval.

    `scores` maps a task to its questions' (unpruned, pruned) scores. Tasks weigh the same, and
    questions are resampled within each task, in pairs. None where the unpruned model scores 0.
    """
    rng = np.random.default_rng(seed)
    base, ours = np.zeros(draws), np.zeros(draws)
    for unpruned, pruned in scores.values():
        rows = rng.integers(0, len(unpruned), (draws, len(unpruned)))
        base += unpruned[rows].mean(1)
        ours += pruned[rows].mean(1)
    point = _ratio(
        sum(p.mean() for _, p in scores.values()), sum(u.mean() for u, _ in scores.values())
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = ours / base
    ratios = ratios[np.isfinite(ratios)]
    if len(ratios) == 0:
        return point, None
    low, high = np.percentile(ratios, [2.5, 97.5])
    return point, [float(low), float(high)]


def accuracy_interval(scores: NDArray[np.float64], draws: int = 2000, seed: int = 0) -> list[float]:
    """95 % interval of the mean of one task's scores."""
    rows = np.random.default_rng(seed).integers(0, len(scores), (draws, len(scores)))
    low, high = np.percentile(scores[rows].mean(1), [2.5, 97.5])
    return [float(low), float(high)]


def _ratio(ours: float, base: float) -> float | None:
    return float(ours / base) if base > 0 else None
