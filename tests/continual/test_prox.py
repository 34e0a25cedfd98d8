"""The two soft thresholds against a scalar loop, and the published ramp."""

import pytest
import torch

from vlm_prune.continual import prox


def loop(w, kappa, operator):
    if operator == "textbook":
        return 0.0 if abs(w) <= kappa else w - kappa if w > 0 else w + kappa
    if w > kappa:
        w = w - kappa
    if w < -kappa:
        w = w + kappa
    return 0.0 if abs(w) < kappa else w


@pytest.mark.parametrize("operator", prox.OPERATORS)
@pytest.mark.parametrize("per_weight", [False, True])
def test_operators_match_a_scalar_loop(operator, per_weight):
    weights = torch.linspace(-1, 1, 801, dtype=torch.float64)
    kappa = torch.full_like(weights, 0.1234) if per_weight else 0.1234
    want = torch.tensor([loop(w, 0.1234, operator) for w in weights.tolist()], dtype=torch.float64)
    got = prox.OPERATORS[operator](weights, kappa)
    torch.testing.assert_close(got, want, atol=1e-15, rtol=0)
    assert ((got == 0) == (want == 0)).all()


def test_the_coded_dead_zone_is_twice_as_wide():
    weights = torch.tensor([0.15, -0.15, 0.25])
    assert prox.textbook(weights, 0.1).count_nonzero() == 3
    assert prox.coded(weights, 0.1).count_nonzero() == 1


def test_the_textbook_operator_is_odd_and_does_not_expand():
    a, b = torch.randn(2, 500, generator=torch.Generator().manual_seed(0))
    assert torch.equal(prox.textbook(-a, 0.3), -prox.textbook(a, 0.3))
    assert ((prox.textbook(a, 0.3) - prox.textbook(b, 0.3)).abs() <= (a - b).abs() + 1e-6).all()


def test_the_published_ramp():
    ramp = [prox.threshold(step, 500, 0.5, 0.005) for step in range(500)]
    assert sum(k > 0 for k in ramp) == 249
    assert ramp[250] == 0 and ramp[251] == pytest.approx(0.005 / 49)
    assert ramp[489] < 0.005 and ramp[490] == ramp[499] == 0.005
    assert prox.total_shrinkage(500, 0.5, 0.005) == pytest.approx(0.64990, abs=5e-6)


@pytest.mark.parametrize(("steps", "dense"), [(500, 0.5), (333, 0.3), (60, 0.5), (7, 0.0)])
def test_the_ramp_is_the_counter_of_the_description(steps, dense):
    start, level = int(dense * steps), 0
    stride = max(1, (steps - start) // 50)
    for step in range(steps):
        if step >= start and step % stride == 0:
            level = min(level + 1, 49)
        want = 0.005 * level / 49 if step > start else 0.0
        assert prox.threshold(step, steps, dense, 0.005) == pytest.approx(want)


@pytest.mark.parametrize(
    ("steps", "dense", "differs"),
    [(500, 0.5, 0), (333, 0.3, 0), (101, 0.25, 48), (60, 0.5, 29), (7, 0, 6)],
)
def test_the_coded_ramp_is_a_counter_over_a_fractional_start(steps, dense, differs):
    """It starts after `dense` times the steps, whole or not, and needs 50 steps to rise at all."""
    start, level, different = dense * steps, 0, 0
    stride = int((steps - start) // 50)
    for step in range(steps):
        if stride > 0 and step >= start and step % stride == 0:
            level += 1
        want = 0.005 * min(level, 49) / 49 if step > start else 0.0
        got = prox.threshold(step, steps, dense, 0.005, ramp="coded")
        assert got == pytest.approx(want)
        different += got != prox.threshold(step, steps, dense, 0.005)
    assert different == differs
    if steps < 100:
        assert prox.total_shrinkage(steps, dense, 0.005, ramp="coded") == 0
