"""Metrics against values worked out by hand."""

import numpy as np
import pytest

from vlm_prune.benchmarks.stats.bootstrap import accuracy_interval, retained
from vlm_prune.benchmarks.tasks.vqa import exact_match, normalise


@pytest.mark.parametrize(
    ("raw", "clean"),
    [("The Cat.", "cat"), ("two", "2"), (" A  red, dog! ", "red dog"), ("3.5", "3.5"), ("", "")],
)
def test_normalise(raw, clean):
    assert normalise(raw) == clean


def test_exact_match():
    assert exact_match("Yes.", "yes") == 1.0
    assert exact_match("no", "yes") == 0.0


def test_identical_scores_retain_everything():
    scores = np.array([1.0, 0, 1, 1])
    assert retained({"a": (scores, scores)}) == (1.0, [1.0, 1.0])


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


def test_the_accuracy_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for draw in range(200):
        low, high = accuracy_interval(rng.binomial(1, 0.8, 100).astype(float), 400, draw)
        covered += low <= 0.8 <= high
    assert 0.9 <= covered / 200 <= 0.99
