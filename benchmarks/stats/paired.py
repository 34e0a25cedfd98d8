"""Whether one method answers better than another, on the same questions."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from vlm_prune.benchmarks.stats.bootstrap import DRAWS, Values, percentiles, resampled

TaskScores = Mapping[str, Values]


def difference(
    ours: TaskScores, theirs: TaskScores, draws: int = DRAWS, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """Returns the mean accuracy of `ours` less that of `theirs`, with a paired bootstrap 95 %
    interval.

    Tasks weigh the same, and questions are resampled within each task.

    Args:
        ours: for each task the scores of its questions.
        theirs: likewise, of the same questions.
        draws: bootstrap samples.
        seed: of the draws.
    """
    gains = [ours[task] - theirs[task] for task in ours]

    def mean(*rows: NDArray[np.int64]) -> Values:
        found: Values = np.mean(
            [gain[each].mean(-1) for gain, each in zip(gains, rows, strict=True)], 0
        )
        return found

    point = float(np.mean([gain.mean() for gain in gains]))
    return point, percentiles(resampled(mean, [len(gain) for gain in gains], draws, seed))


def mcnemar(ours: TaskScores, theirs: TaskScores) -> float:
    """Returns the exact two-sided p-value of McNemar's test over all questions.

    Where scores are shares it is that of the sign test, of which McNemar's is a case.
    """
    # questions that one side wins; ties say nothing
    gains = np.concatenate([ours[task] - theirs[task] for task in ours])
    won, lost = int((gains > 0).sum()), int((gains < 0).sum())
    return float(binomtest(won, won + lost).pvalue) if won + lost else 1.0
