"""What a measurement was made with, so that it can be repeated."""

import platform
import shlex
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def versions(*more: str) -> dict[str, str]:
    """Returns versions of Python and of the packages that decide
    results; `more` where installed.
    """
    found = {"python": platform.python_version()}
    for name in ("vlm-prune", "torch", "transformers", *more):
        installed = installed_version(name)
        if installed is not None:
            found[name] = installed
    return found


@cache
def installed_version(name: str) -> str | None:
    """Returns the version of an installed package, whose description is read once; else None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def device_name(device: torch.device) -> str:
    """Returns the GPU's name, or the CPU's architecture and threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def command_line() -> str:
    """Returns the command that runs, as a shell reads it."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def environment(device: torch.device) -> dict[str, str]:
    """Returns device, driver, versions and the command that runs."""
    driver = "none"
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    about = {"device": device_name(device), "driver": driver, **versions("triton")}
    return about | {"command": command_line()}
