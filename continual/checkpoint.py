"""The files of a run: every one appears whole or not at all; tensors are safetensors only.

`state-K` holds the model and the method after K tasks, `step-K-S` what was trained in the task
after them up to step S. Only the newest of each stays.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlm_prune.vlm.common.files import write_folder, write_text

Tensors = dict[str, Tensor]


def cut_log(path: Path, before: Callable[[dict[str, Any]], bool]) -> None:
    """Drop the lines of steps that will be taken again, and a torn last line."""
    if path.is_file():
        lines = path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and before(json.loads(line))]
        write_text(path, "".join(kept))


def save_tensors(path: Path, tensors: Tensors) -> None:
    save_file({n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}, path)


def save_state(output: Path, done: int, model: Tensors, method: Tensors) -> None:
    """What a run needs after `done` tasks; removes what came before."""

    def fill(folder: Path) -> None:
        save_tensors(folder / "model.safetensors", model)
        save_tensors(folder / "method.safetensors", method)

    write_folder(output / f"state-{done}", fill)
    for old in [*output.glob("state-*"), *output.glob("step-*")]:
        if old.name != f"state-{done}":
            shutil.rmtree(old)


def load_state(output: Path) -> tuple[int, Tensors, Tensors]:
    """Tasks done (0 for none), the model's and the method's tensors."""
    found = [
        int(m[1]) for p in output.glob("state-*") if (m := re.fullmatch(r"state-(\d+)", p.name))
    ]
    if not found:
        return 0, {}, {}
    folder = output / f"state-{max(found)}"
    model, method = (load_file(folder / f"{name}.safetensors") for name in ("model", "method"))
    return max(found), model, method


def save_step(
    output: Path, done: int, step: int, trained: Tensors, optimizer: Any, method: Tensors
) -> None:
    """What a run needs after `step` steps of the task after `done` others."""
    moments = {
        f"{index}|{name}": tensor
        for index, entry in optimizer.state_dict()["state"].items()
        for name, tensor in entry.items()
    }

    def fill(folder: Path) -> None:
        for name, tensors in (("trained", trained), ("optimizer", moments), ("method", method)):
            save_tensors(folder / f"{name}.safetensors", tensors)

    write_folder(output / f"step-{done}-{step}", fill)
    for old in output.glob("step-*"):
        if old.name != f"step-{done}-{step}":
            shutil.rmtree(old)


def load_step(output: Path, done: int, trained: Tensors, optimizer: Any) -> tuple[int, Tensors]:
    """Fill in the trained tensors and the optimizer; returns the steps taken, the method's tensors."""
    pattern = re.compile(rf"step-{done}-(\d+)")
    found = [int(m[1]) for p in output.glob("step-*") if (m := pattern.fullmatch(p.name))]
    if not found:
        return 0, {}
    folder = output / f"step-{done}-{max(found)}"
    saved = load_file(folder / "trained.safetensors")
    with torch.no_grad():
        for name, tensor in trained.items():
            tensor.copy_(saved[name])
    entries: dict[int, dict[str, Tensor]] = {}
    for key, tensor in load_file(folder / "optimizer.safetensors").items():
        index, _, name = key.partition("|")
        entries.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict(optimizer.state_dict() | {"state": entries})
    return max(found), load_file(folder / "method.safetensors")
