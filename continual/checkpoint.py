"""The files of a run: every one appears whole or not at all; tensors are safetensors only.

`state-K` holds the model and the method after K tasks, `step-K-S` what was trained in the task
after them up to step S. Only the newest of each stays.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from vlm_prune.vlm.common.errors import naming
from vlm_prune.vlm.common.files import read_text, write_folder, write_text
from vlm_prune.vlm.common.records import from_json
from vlm_prune.vlm.common.state import (
    load_tensors,
    newest,
    optimizer_tensors,
    refuse_pickles,
    restore,
    restore_optimizer,
    save_tensors,
)

Tensors = dict[str, Tensor]


def cut_log(path: Path, before: Callable[[dict[str, Any]], bool]) -> None:
    """Drops the lines of steps that will be taken again, and a torn last line.

    Raises:
        InputError: if another line is damaged.
    """
    if not path.exists():
        return
    kept = []
    for line in read_text(path).splitlines(keepends=True):
        if line.endswith("\n"):
            entry = from_json(line, dict[str, Any], str(path), "remove it")
            with naming(f"{path} is damaged, remove it"):
                kept += [line] if before(entry) else []
    write_text(path, "".join(kept))


def save_state(output: Path, done: int, model: Tensors, method: Tensors) -> None:
    """Writes what a run needs after `done` tasks, and removes what came before.

    Args:
        output: folder of the run.
        done: tasks that are trained.
        model: all tensors of the model by name.
        method: what the method needs to go on.
    """

    def fill(folder: Path) -> None:
        save_tensors(folder / "model.safetensors", model)
        save_tensors(folder / "method.safetensors", method)

    write_folder(output / f"state-{done}", fill)
    for old in [*output.glob("state-*"), *output.glob("step-*")]:
        if old.name != f"state-{done}":
            shutil.rmtree(old)


def load_state(output: Path, model: Tensors) -> tuple[int, Tensors]:
    """Fills in the model's tensors; returns the tasks done (0 for none) and the method's tensors.

    Raises:
        InputError: if a file is damaged, of another run, or a pickle.
    """
    done, folder = newest(output, "state-N")
    if folder is None:
        return 0, {}
    refuse_pickles(folder)
    restore(folder / "model.safetensors", model)
    return done, load_tensors(folder / "method.safetensors")


def save_step(
    output: Path, done: int, step: int, trained: Tensors, optimizer: Any, method: Tensors
) -> None:
    """Writes what a run needs after `step` steps of the task after `done` others.

    Args:
        output: folder of the run.
        done: tasks that are trained.
        step: steps taken in the present one.
        trained: the tensors in training by name.
        optimizer: whose moments are stored.
        method: what the method needs to go on.
    """
    moments = optimizer_tensors(optimizer)

    def fill(folder: Path) -> None:
        for name, tensors in (("trained", trained), ("optimizer", moments), ("method", method)):
            save_tensors(folder / f"{name}.safetensors", tensors)

    write_folder(output / f"step-{done}-{step}", fill)
    for old in output.glob("step-*"):
        if old.name != f"step-{done}-{step}":
            shutil.rmtree(old)


def load_step(output: Path, done: int, trained: Tensors, optimizer: Any) -> tuple[int, Tensors]:
    """Fills in the trained tensors and the optimizer; returns the steps
    taken, the method's tensors.

    Args:
        output: folder of the run.
        done: tasks that are trained.
        trained: the tensors in training by name, which are filled in.
        optimizer: whose moments are filled in.

    Raises:
        InputError: if a file is damaged, of another run, or a pickle.
    """
    step, folder = newest(output, f"step-{done}-N")
    if folder is None:
        return 0, {}
    refuse_pickles(folder)
    restore(folder / "trained.safetensors", trained)
    restore_optimizer(folder / "optimizer.safetensors", optimizer)
    return step, load_tensors(folder / "method.safetensors")
