"""Tensors of a training on disk: safetensors alone, so that reading them runs no code."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlm_prune.vlm.common.errors import InputError, first_line

PICKLES = (".bin", ".ckpt", ".joblib", ".npy", ".pickle", ".pkl", ".pt", ".pth")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises `OSError` for a full disk and the like while models and
    tokenizers are saved in the block.

    safetensors and tokenizers raise errors of their own, which tell the number in their text.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(path)) from error


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors by name; those that share memory are stored apart.

    Raises:
        OSError: if the file cannot be written.
    """
    copies = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}
    with writing(path):
        save_file(copies, path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a file by name.

    Raises:
        InputError: if the file is missing or damaged.
    """
    if not path.is_file():
        raise InputError(f"there is no {path}")
    try:
        return load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{path} is damaged: {first_line(error)}") from error


@torch.no_grad()
def restore(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fills tensors in place with those of a file that `save_tensors` wrote.

    Raises:
        InputError: if the file is missing or damaged, or its names or shapes are others.
    """
    saved = load_tensors(path)
    check_names(path, saved, tensors)
    for name, tensor in tensors.items():
        tensor.copy_(saved[name])


def check_names(path: Path, saved: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raises `InputError` unless a file's tensors have the names and shapes of other ones.

    Args:
        path: the file, for the message.
        saved: its tensors by name.
        wanted: tensors of the names and shapes that it must have.
    """
    for name in sorted(saved.keys() ^ wanted.keys()):
        raise InputError(f"{path} is of another run: {name!r} is in one of them alone")
    for name, tensor in wanted.items():
        if saved[name].shape != tensor.shape:
            raise InputError(f"{path} is of another run: {name!r} has another shape")


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Returns what an optimizer remembers of its parameters, named `number|entry`.

    Learning rates and other settings are not part of it: they follow from the step.
    """
    return {
        f"{number}|{name}": torch.as_tensor(value)
        for number, entries in optimizer.state_dict()["state"].items()
        for name, value in entries.items()
    }


def restore_optimizer(path: Path, optimizer: torch.optim.Optimizer) -> None:
    """Gives an optimizer what `optimizer_tensors` returned and a file holds.

    Raises:
        InputError: if the file is missing, damaged or of an optimizer of other parameters.
    """
    restore_moments(path, optimizer, load_tensors(path))


def restore_moments(
    path: Path, optimizer: torch.optim.Optimizer, moments: Mapping[str, Tensor]
) -> None:
    """Gives an optimizer what `optimizer_tensors` returned.

    Args:
        path: where it was stored, for messages.
        optimizer: one of the same parameters.
        moments: its tensors by name.

    Raises:
        InputError: if they are of an optimizer of other parameters.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in moments.items():
        number, _, name = key.partition("|")
        if not (number.isdecimal() and int(number) < len(parameters)):
            raise InputError(f"{path} is of another run: there is no parameter {number!r}")
        if tensor.numel() != 1 and tensor.shape != parameters[int(number)].shape:
            raise InputError(f"{path} is of another run: {key!r} has another shape")
        state.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def refuse_pickles(folder: Path) -> None:
    """Raises `InputError` naming the first file below a folder whose
    kind runs code when it is read.
    """
    for path in sorted(folder.rglob("*")):
        if path.suffix in PICKLES:
            raise InputError(
                f"{path} is a pickle, which is not read: it can run code; remove {folder}, and what "
                "is left goes on from an earlier checkpoint"
            )


def newest(folder: Path, pattern: str) -> tuple[int, Path | None]:
    """Returns the largest number that stands for `N` in names of a folder, and what has that name.

    Args:
        folder: where to look.
        pattern: a name such as `checkpoint-N`.

    Returns:
        The number and the path; 0 and None if there is none.
    """
    before, after = pattern.split("N")
    form = re.compile(re.escape(before) + r"(\d+)" + re.escape(after))
    found = [(int(m[1]), path) for path in folder.glob("*") if (m := form.fullmatch(path.name))]
    return max(found, default=(0, None))


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seeds torch for one step of one process, so that a resumed run draws
    what an undisturbed one does.

    Args:
        seed: of the run.
        step: the step.
        rank: of the process.
    """
    import numpy as np

    torch.manual_seed(
        int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0])
    )


def tensors_below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors whose names begin with a prefix, by the rest of their names."""
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
