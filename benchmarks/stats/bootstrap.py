"""Bootstrap intervals, stratified and paired: one resampling for all statistics."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
PairedScores = Mapping[str, tuple[Values, Values]]
DRAWS = 2000
MOST_INDICES = 2**22  # held at once


def resampled(
    statistic: Callable[..., Values], sizes: Sequence[int], draws: int = DRAWS, seed: int = 0
) -> Values:
    """Returns bootstrap draws of a statistic of several strata, each resampled on its own.

    Args:
        statistic: takes one array of indices (D, n) for each stratum, of its n members with
            repetitions, and returns values (..., D). Pairs stay together, because what has one
            index is drawn together.
        sizes: the strata's members.
        draws: how many.
        seed: of the drawing.

    Returns:
        Values (..., draws).
    """
    generator = np.random.default_rng(seed)
    most = max(1, MOST_INDICES // max(1, sum(sizes)))
    found = []
    for start in range(0, draws, most):
        count = min(most, draws - start)
        # indices are drawn, not values, so that pairs stay together
        rows = [generator.integers(0, max(1, size), (count, size)) for size in sizes]
        # a draw may be undefined, which is for the caller to tell
        with np.errstate(invalid="ignore"):
            found.append(statistic(*rows))
    return np.concatenate(found, -1)


def percentiles(values: Values) -> tuple[float, float]:
    """Returns the 95 % interval of bootstrap draws (D,)."""
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def mean_interval(values: Values, draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
    """Returns the 95 % interval of the mean of values.

    Args:
        values: (n,).
        draws: bootstrap samples.
        seed: of the draws.
    """
    return percentiles(resampled(lambda rows: values[rows].mean(-1), [len(values)], draws, seed))


def retained(
    scores: PairedScores, draws: int = DRAWS, seed: int = 0
) -> tuple[float | None, tuple[float, float] | None]:
    """Returns mean pruned over mean unpruned accuracy, with a 95 % interval; None where the
    unpruned model scores 0.

    Tasks weigh the same, and questions are resampled within each task, in pairs.

    Args:
        scores: for each task its questions' (unpruned, pruned) scores.
        draws: bootstrap samples.
        seed: of the draws.
    """
    pairs = list(scores.values())

    # sums of task means, (D,): their ratio is that of the means over tasks
    def ratios(*rows: NDArray[np.int64]) -> Values:
        drawn = list(zip(pairs, rows, strict=True))
        base = np.sum([unpruned[each].mean(-1) for (unpruned, _), each in drawn], 0)
        ours = np.sum([pruned[each].mean(-1) for (_, pruned), each in drawn], 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            found: Values = ours / base
        return found

    base = sum(unpruned.mean() for unpruned, _ in pairs)
    if base == 0:
        return None, None
    found = resampled(ratios, [len(unpruned) for unpruned, _ in pairs], draws, seed)
    # a draw whose unpruned accuracy is 0 has no ratio
    point = float(sum(pruned.mean() for _, pruned in pairs) / base)
    return point, percentiles(found[np.isfinite(found)])
