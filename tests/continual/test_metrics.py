"""Metrics on matrices small enough to work out by hand."""

import io
import json

import numpy as np
import pytest
import torch
from rich.console import Console

from vlm_prune.continual import metrics
from vlm_prune.continual.metrics import AccuracyMatrix, bootstrap_means, drift, retention, summary
from vlm_prune.vlm.common.errors import InputError

HAND = np.array([[0.8, 0.0, 0.3], [0.6, 0.9, 0.5], [0.7, 0.4, 1.0]])


def test_by_hand_and_zero_is_not_skipped():
    assert metrics.transfer(HAND).tolist() == pytest.approx([0.0, 0.4])
    assert metrics.average(HAND).tolist() == pytest.approx([0.7, 1.3 / 3, 0.6])
    assert metrics.last(HAND).tolist() == pytest.approx([0.7, 0.4, 1.0])
    assert metrics.forgetting(HAND).tolist() == pytest.approx([0.1, 0.5])
    # the best before the last step may come before the task is learned
    early = np.array([[0.8, 0.95, 0.3], [0.6, 0.9, 0.5], [0.7, 0.4, 1.0]])
    assert metrics.forgetting_from_best(early).tolist() == pytest.approx([0.1, 0.55])
    assert metrics.incremental(HAND).tolist() == pytest.approx([0.8, 0.75, 0.7])
    means = {name: float(value) for name, value in summary(HAND).items()}
    assert means == pytest.approx(
        {"transfer": 0.2, "average": 5.2 / 9, "last": 0.7, "forgetting": 0.3,
         "forgetting_from_best": 0.3, "incremental": 0.75}
    )  # fmt: skip


def test_published_zero_shot_row():
    row = [24.3, 88.4, 68.2, 44.6, 54.9, 71.0, 88.5, 59.4, 89.0, 64.7, 65.2]
    found = summary(np.tile(row, (11, 1)))
    rounded = [round(float(found[name]), 1) for name in ("transfer", "average", "last")]
    assert rounded == [69.4, 65.3, 65.3] and found["forgetting"] == pytest.approx(0, abs=1e-9)


def test_one_task_has_no_transfer():
    assert list(summary([[0.5]])) == ["average", "last", "incremental"]


@pytest.mark.parametrize("bad", [[0.5], [[0.5, 0.6]], [[np.nan]], [[]]])
def test_matrices_that_are_none(bad):
    with pytest.raises(InputError):
        summary(bad)


@pytest.fixture
def matrix():
    rng = np.random.default_rng(0)
    sizes = (40, 60, 50)
    hits = [(rng.random((3, n)) < HAND[:, [k]]).astype(np.uint8) for k, n in enumerate(sizes)]
    zero = [(rng.random(n) < 0.3).astype(np.uint8) for n in sizes]
    return AccuracyMatrix(("a", "b", "c"), tuple(hits), tuple(zero))


def test_intervals_agree_with_a_plain_bootstrap(matrix):
    limits = matrix.intervals(draws=4000)
    rng, drawn = np.random.default_rng(1), []
    for _ in range(4000):
        columns = []
        for hits in matrix.hits:
            columns.append(hits[:, rng.integers(hits.shape[1], size=hits.shape[1])].mean(1))
        drawn.append(float(summary(np.stack(columns, 1))["forgetting"]))
    assert limits["forgetting"] == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.01)
    assert limits == matrix.intervals(draws=4000)


def test_rows_are_resampled_together():
    hits = np.array([[1, 0, 1, 0, 1], [0, 1, 0, 1, 0]])
    drawn = bootstrap_means(hits, 50, np.random.default_rng(0))
    assert drawn.sum(1) == pytest.approx(np.ones(50)) and drawn[:, 0].std() > 0.1


def test_json_table_and_heat_map(matrix, tmp_path):
    matrix.write(tmp_path / "matrix.json")
    written = json.loads((tmp_path / "matrix.json").read_text())
    assert written["accuracy"] == matrix.values.tolist() and written["test_images"] == [40, 60, 50]
    assert written["zero_shot"] == matrix.zero_shot_values.tolist()
    low, high = written["metrics"]["last"]["ci"]
    assert low < written["metrics"]["last"]["value"] < high
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(matrix.table())
    text = console.export_text()
    assert "zero-shot" in text and f"{100 * matrix.values[2, 1]:.1f}" in text
    assert "forgetting from best" in text
    matrix.heat_map(tmp_path / "matrix.png")
    matrix.heat_map(tmp_path / "matrix.svg")
    assert (tmp_path / "matrix.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(tmp_path.glob("*partial*"))


def test_hits_that_do_not_fit():
    hits = np.ones((1, 4), np.uint8)
    with pytest.raises(InputError, match="2 names"):
        AccuracyMatrix(("a", "b"), (hits,))
    with pytest.raises(InputError, match=r"hits of a must be \(1, n > 0\)"):
        AccuracyMatrix(("a",), (hits[:, :0],))
    with pytest.raises(InputError, match="zero-shot hits of a"):
        AccuracyMatrix(("a",), (hits,), (np.ones(3, np.uint8),))


def test_retention_is_paired():
    before = np.array([1] * 80 + [0] * 20)
    after = before.copy()
    after[:30] = 0
    found = retention(before, after)
    assert (found["before"], found["after"]) == (0.8, 0.5)
    assert found["difference"] == pytest.approx(-0.3)
    assert found["ci"][0] < -0.3 < found["ci"][1] < 0
    same = retention(before, before)
    assert same["ci"] == [0, 0]
    with pytest.raises(InputError, match="same images"):
        retention(before, after[1:])


def test_drift():
    before = {"w": torch.zeros(2, 2), "n": torch.tensor([3])}
    after = {"w": torch.full((2, 2), 2.0), "n": torch.tensor([9])}
    assert drift(before, after) == 4.0 and drift(before, before) == 0.0
    with pytest.raises(InputError, match="'extra'"):
        drift(before, after | {"extra": torch.zeros(1)})
