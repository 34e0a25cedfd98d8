"""Reading the clock and the peak memory of a device."""

import contextlib
import resource
import sys
import time
from pathlib import Path

import torch


def now(device: torch.device) -> float:
    """Returns the time in seconds, after everything queued on the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_bytes(device: torch.device) -> int:
    """Returns the most memory that was in use: of a GPU since its last reset, else of this process.

    Linux's `getrusage` would also count what the parent held when it started this process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
