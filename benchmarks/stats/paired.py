"""Whether one method answers better than another, on the same questions."""

from collections.abc import Mapping
from math import comb

import numpy as np
from numpy.typing import NDArray

Scores = Mapping[str, NDArray[np.float64]]


def difference(
    ours: Scores, theirs: Scores, draws: int = 2000, seed: int = 0
) -> tuple[float, list[float]]:
    """Mean accuracy of `ours` less that of `theirs`, with a paired bootstrap 95 % interval.

    Both map a task to the scores of the same questions. Tasks weigh the same, and questions are
    resampled within each task.
    """
    rng, total = np.random.default_rng(seed), np.zeros(draws)
    gains = [ours[task] - theirs[task] for task in ours]
    for gain in gains:
        total += gain[rng.integers(0, len(gain), (draws, len(gain)))].mean(1)
    low, high = np.percentile(total / len(gains), [2.5, 97.5])
    return float(np.mean([gain.mean() for gain in gains])), [float(low), float(high)]


def mcnemar(ours: Scores, theirs: Scores) -> float:
    """Exact two-sided p-value of McNemar's test over all questions, scores being 0 or 1."""
    gains = np.concatenate([ours[task] - theirs[task] for task in ours])
    won, lost = int((gains > 0).sum()), int((gains < 0).sum())
    tail = sum(comb(won + lost, k) for k in range(min(won, lost) + 1))
    return float(min(1, 2 * tail / 2 ** (won + lost)))
