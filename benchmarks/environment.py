"""What a measurement was made with, so that it can be repeated."""

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def versions(*more: str) -> dict[str, str]:
    """Versions of Python and of the packages that decide results; `more` where installed."""
    found = {"python": platform.python_version()}
    for name in ("vlm-prune", "torch", "transformers", *more):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def environment(device: torch.device) -> dict[str, str]:
    """Device, driver, versions and the command that runs."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    else:
        name, driver = f"{platform.machine()} CPU, {torch.get_num_threads()} threads", "none"
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return {"device": name, "driver": driver, **versions("triton"), "command": command}
