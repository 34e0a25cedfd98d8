"""What a device can do at most, measured on it, and how far from that an operation is."""

import ctypes
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from vlm_prune.vlm.common.timing import now

COPIED = 1 << 26  # numbers
TRIM_THRESHOLD, MMAP_MAX = -1, -4  # of mallopt, with glibc's defaults of 128 KiB and 65,536 below


@dataclass(frozen=True)
class Ceilings:
    """Measured limits of a device.

    Args:
        flops: FLOP/s of a large matrix product.
        bandwidth: bytes/s, read and written, of a large copy.
    """

    flops: float
    bandwidth: float

    def floor_ms(self, flops: float, moved: float) -> float:
        """Returns the least milliseconds for `flops` operations and `moved`
        bytes, both at full speed at once.
        """
        return 1e3 * max(flops / self.flops, moved / self.bandwidth)


@dataclass(frozen=True)
class Timing:
    """Milliseconds of repeated calls: median, and quartiles as spread."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, milliseconds: list[float]) -> "Timing":
        if len(milliseconds) < 2:
            return cls(*milliseconds * 3)
        low, median, high = statistics.quantiles(milliseconds, n=4, method="inclusive")
        return cls(median, low, high)

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


@contextmanager
def kept_memory() -> Iterator[None]:
    """Lets glibc keep what a CPU's tensors free, as other allocators do, while the block is open.

    Large blocks go back to the system otherwise, and the page faults of their return take as long
    as some operations, more or fewer of them by chance.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        yield
        return
    mallopt(MMAP_MAX, 0)
    mallopt(TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        mallopt(MMAP_MAX, 1 << 16)
        mallopt(TRIM_THRESHOLD, 1 << 17)


def timed(
    call: Callable[[], Any], device: torch.device, repeats: int = 20, least_ms: float = 5
) -> Timing:
    """Returns the time of a call after warming it up.

    Args:
        call: what is timed.
        device: whose work is waited for.
        repeats: samples.
        least_ms: of a sample; short calls are repeated inside it.
    """
    for _ in range(2):
        call()
    start = now(device)
    call()
    inner = max(1, int(least_ms / max(1e-3, 1e3 * (now(device) - start))))
    samples = []
    for _ in range(repeats):
        start = now(device)
        for _ in range(inner):
            call()
        samples.append(1e3 * (now(device) - start) / inner)
    return Timing.of(samples)


def measured_ceilings(device: torch.device, dtype: torch.dtype, side: int = 8192) -> Ceilings:
    """Returns ceilings from a square matrix product and a copy that no cache holds.

    Args:
        device: to measure.
        dtype: of the matrices.
        side: of the matrices.
    """
    one, other = torch.randn(2, side, side, device=device).to(dtype)
    product = timed(lambda: one @ other, device, repeats=5)
    one, other = torch.ones(2, COPIED, device=device, dtype=dtype)
    copy = timed(lambda: one.copy_(other), device, repeats=5)
    return Ceilings(
        flops=2 * side**3 / (product.median / 1e3),
        bandwidth=2 * one.numel() * one.itemsize / (copy.median / 1e3),
    )
