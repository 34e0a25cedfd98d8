"""Kernels run in Triton's interpreter on a CPU, and compiled on a GPU (`pytest -m gpu`)."""

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.skipif(HAS_GPU, reason="kernels are compiled here")),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def device(request):
    pytest.importorskip("triton")
    return request.param


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Memory that a kernel forgets to write shows as NaN, or as the largest integer."""

    def poisoned(make):
        def empty(*args, **kwargs):
            tensor = make(*args, **kwargs)
            if tensor.is_floating_point():
                return tensor.fill_(torch.nan)
            return tensor.fill_(1 if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)

        return empty

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture
def make(device):
    """Random tensors from a fixed seed."""
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    return tensor


@pytest.fixture
def assert_near():
    """Compare by root-mean-square error relative to the exact tensor's root mean square."""

    def check(name, ours, exact, dtype=torch.float32):
        assert ours.shape == exact.shape, name
        error = (ours.double() - exact).square().mean().sqrt()
        size = exact.square().mean().sqrt()
        assert error <= TOLERANCE[dtype] * size, f"{name}: {error / size:.1e} of its size"

    return check
