"""Which implementation of an operation runs: Triton on CUDA, the PyTorch reference elsewhere."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

Backend = Literal["triton", "reference"]

_forced: Backend | None = None


@contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Runs every operation on `name` inside a `with` block, for tests and benchmarks."""
    global _forced
    outer, _forced = _forced, name
    try:
        yield
    finally:
        _forced = outer


@cache
def has_triton() -> bool:
    """Returns whether the triton package is installed."""
    return find_spec("triton") is not None


def backend_for(tensor: Tensor) -> Backend:
    """Returns the backend for `tensor`: `triton` on a GPU, but `reference` for float64,
    because kernels accumulate in fp32.
    """
    if _forced is not None:
        return _forced
    fused = tensor.is_cuda and tensor.dtype != torch.float64 and has_triton()
    return "triton" if fused else "reference"


def implementation(op: str, tensor: Tensor) -> Any:
    """Returns the module that computes `op` on `tensor`; triton is
    imported only when it is chosen.
    """
    file = {"triton": "triton_kernel", "reference": "reference"}[backend_for(tensor)]
    return import_module(f"vlm_prune.kernels.{op}.{file}")


def multiplies_bf16(device: torch.device) -> bool:
    """Returns whether a device is a CPU that multiplies matrices of bfloat16 many times as fast as of fp32."""
    known: Callable[[], Mapping[str, object]] = getattr(torch.cpu, "get_capabilities", dict)
    return device.type == "cpu" and bool(known().get("amx_bf16"))
