"""The kernel benchmark measures every operation, and none whose check fails."""

import pytest
import torch

from vlm_prune.benchmarks.speed import kernels
from vlm_prune.benchmarks.speed.roofline import Ceilings, Timing, measured_ceilings, timed

CPU = torch.device("cpu")
SMALL = kernels.Shape(
    image=6, text=3, keep=3, heads=2, head_dim=8, tower_heads=2, tower_head_dim=4, directions=2
)


@pytest.fixture
def quick(monkeypatch):
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled here")
    monkeypatch.setattr(kernels, "timed", lambda call, device: timed(call, device, 1, 0))


def test_every_operation_is_checked_and_measured(quick):
    from pathlib import Path

    ceilings = Ceilings(1e12, 1e9)
    rows = [
        kernels.measure_case(case, ceilings, CPU, torch.float32, compiled=False)
        for case in kernels.cases(SMALL, CPU, torch.float32)
    ]
    assert [row["error"] for row in rows] == [""] * len(rows)
    measured = {row["operation"].split()[0] for row in rows}
    folders = {
        path.parent.name for path in Path(kernels.__file__).parents[2].glob("kernels/*/op.py")
    }
    assert folders - {"token_sensitivity"} | {"monte_carlo", "closed_form"} == measured
    for row in rows:
        assert row["triton_ms"]["median"] > 0 < row["reference_ms"]["median"]
        assert row["floor_ms"] == 1e3 * max(row["flops"] / 1e12, row["bytes"] / 1e9)
    table = kernels.kernel_table(rows, {"device": "CPU"})
    assert len(table.splitlines()) == 4 + len(rows) and "- device: CPU" in table


def test_a_wrong_kernel_is_not_measured(quick, monkeypatch):
    from vlm_prune.kernels.greedy_select import triton_kernel

    right = triton_kernel.greedy_select
    monkeypatch.setattr(triton_kernel, "greedy_select", lambda *a: right(*a).flip(1))
    case = next(c for c in kernels.cases(SMALL, CPU, torch.float32) if "greedy" in c.name)
    row = kernels.measure_case(case, Ceilings(1, 1), CPU, torch.float32, compiled=False)
    assert "selections differ" in row["error"] and set(row) == {"operation", "error"}
    assert "not measured" in kernels.kernel_table([row], {})


def test_timing_is_median_and_quartiles():
    assert Timing.of([5.0, 1.0, 2.0, 3.0, 4.0]) == Timing(3.0, 2.0, 4.0)
    assert Timing.of([2.0]) == Timing(2.0, 2.0, 2.0)


def test_ceilings_are_positive():
    ceilings = measured_ceilings(CPU, torch.float32, side=64)
    assert ceilings.flops > 0 and ceilings.bandwidth > 0
