"""Metrics against values worked out by hand."""

import numpy as np
import pytest

from vlm_prune.benchmarks.stats.bootstrap import mean_interval, resampled, retained
from vlm_prune.benchmarks.stats.paired import difference, mcnemar
from vlm_prune.benchmarks.tasks.vqa import exact_match, normalize


@pytest.mark.parametrize(
    ("raw", "clean"),
    [("The Cat.", "cat"), ("two", "2"), (" A  red, dog! ", "red dog"), ("3.5", "3.5"), ("", "")],
)
def test_normalize(raw, clean):
    assert normalize(raw) == clean


def test_exact_match():
    assert exact_match("Yes.", "yes") == 1.0
    assert exact_match("no", "yes") == 0.0


def test_identical_scores_retain_everything():
    scores = np.array([1.0, 0, 1, 1])
    assert retained({"a": (scores, scores)}) == (1.0, (1.0, 1.0))


def test_pairing_narrows_the_interval():
    rng = np.random.default_rng(0)
    base = (rng.random(200) < 0.8).astype(float)
    ours = base * (rng.random(200) < 0.9)
    point, (low, high) = retained({"a": (base, ours)})
    _, (unpaired_low, unpaired_high) = retained({"a": (base, rng.permutation(ours))})
    assert low < point < high
    assert high - low < unpaired_high - unpaired_low


def test_nothing_to_retain_is_not_a_number():
    assert retained({"a": (np.zeros(3), np.zeros(3))}) == (None, None)


@pytest.mark.filterwarnings("error")
def test_draws_without_a_right_unpruned_answer_are_left_out_without_a_warning():
    point, interval = retained({"a": (np.array([1.0, 0, 0]), np.ones(3))})
    assert point == 3.0
    assert interval is not None
    assert np.isfinite(interval).all()


def test_the_accuracy_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for draw in range(200):
        low, high = mean_interval(rng.binomial(1, 0.8, 100).astype(float), 400, draw)
        covered += low <= 0.8 <= high
    assert 0.9 <= covered / 200 <= 0.99


def test_resampling_is_stratified_and_pairs_stay_together():
    base = [np.arange(5.0), np.arange(3.0) + 10, np.array([7.0])]

    def means(*rows):
        assert [each.shape for each in rows] == [(len(rows[0]), len(values)) for values in base]
        assert all((each < len(values)).all() for each, values in zip(rows, base, strict=True))
        drawn = [values[each] for values, each in zip(base, rows, strict=True)]
        return np.stack([each.mean(-1) for each in drawn])

    drawn = resampled(means, [5, 3, 1], draws=4000)
    assert drawn.shape == (3, 4000)
    assert drawn.mean(1) == pytest.approx([2, 11, 7], abs=0.05)
    deviations = [values.std() / np.sqrt(len(values)) for values in base]
    assert drawn.std(1) == pytest.approx(deviations, abs=0.03)
    assert abs(np.corrcoef(drawn[:2])[0, 1]) < 0.05
    assert np.array_equal(drawn, resampled(means, [5, 3, 1], draws=4000))
    assert mean_interval(np.array([0.5])) == (0.5, 0.5)


def test_a_paired_difference_and_its_test_by_hand():
    ours, theirs = {"a": np.array([1.0, 1, 1, 0]), "b": np.array([1.0])}, {}
    theirs = {"a": np.array([1.0, 0, 0, 1]), "b": np.array([0.0])}
    point, (low, high) = difference(ours, theirs)
    assert point == (0.25 + 1) / 2 and low < point < high
    assert mcnemar(ours, theirs) == pytest.approx(2 * (1 + 4) / 2**4)  # 3 won, 1 lost
    assert mcnemar(ours, ours) == 1.0
