"""Reading the clock of a device."""

import time

import torch


def now(device: torch.device) -> float:
    """Seconds, after everything queued on the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
