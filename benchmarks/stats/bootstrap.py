"""Bootstrap intervals, stratified and paired: one resampling, by scipy, for all statistics."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import DegenerateDataWarning, bootstrap

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
    # scipy does not resample a stratum of one member, which has but one resample
    several = [number for number, size in enumerate(sizes) if size > 1]

    # scipy draws from indices, not from values, so that pairs stay together
    def of_indices(*drawn: NDArray[Any], axis: int = -1) -> Values:
        count = drawn[0].shape[0] if drawn else draws
        strata = [np.zeros((count, size), int) for size in sizes]
        for number, indices in zip(several, drawn, strict=True):
            strata[number] = indices
        return statistic(*strata)

    if not several:
        return of_indices()
    # a draw may be undefined, which is for the caller to tell
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        warnings.simplefilter("ignore", DegenerateDataWarning)
        found = bootstrap(
            [np.arange(sizes[number]) for number in several], of_indices, n_resamples=draws,
            batch=max(1, MOST_INDICES // sum(sizes)), vectorized=True, method="percentile",
            rng=np.random.default_rng(seed),
        )  # fmt: skip
    values: Values = found.bootstrap_distribution
    return values


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
