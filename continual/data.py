"""Batches of a task: which images, in which order, augmented how; all a function of the seed."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlm_prune.continual.clip import Clip, Transform
from vlm_prune.continual.streams.base import StreamTask, check_task_names
from vlm_prune.vlm.common.errors import InputError

PADDING = -1
AugmentedIndex = tuple[int, int]  # index of an image, seed of its augmentation


def plan(images: int, batch: int, steps: int, key: Sequence[int]) -> list[list[int]]:
    """Returns the indices of each step's images: reshuffled passes, of which the last batch may be
    smaller.

    Args:
        images: how many there are.
        batch: images per step.
        steps: how many to plan.
        key: of the random generator; the same key gives the same plan.
    """
    generator, batches = np.random.default_rng(list(key)), list[list[int]]()
    while len(batches) < steps:
        # one pass over all images in a new order
        order = generator.permutation(images).tolist()
        batches += [order[at : at + batch] for at in range(0, images, batch)]
    return batches[:steps]


class Pictures(Dataset[tuple[Tensor, int] | InputError]):
    """Pixels and label of a split's images; a draw with a seed is augmented by that seed.

    An image that cannot be read is returned as its error: torch would make a traceback of many
    lines of one that is raised in a process that loads images.
    """

    def __init__(self, split: Sequence[tuple[Image.Image, int]], transform: Transform) -> None:
        self.split, self.transform = split, transform

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, draw: AugmentedIndex) -> tuple[Tensor, int] | InputError:
        index, seed = draw
        try:
            image, label = self.split[index]
        except InputError as error:
            return InputError(str(error))
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed seeds every device and writes a stack trace for each: milliseconds
            torch.default_generator.manual_seed(seed)
            return self.transform(image), label


def _collate(
    rows: list[tuple[Tensor, int] | InputError],
) -> tuple[Tensor, Tensor] | InputError:
    readable = list[tuple[Tensor, int]]()
    for row in rows:
        if isinstance(row, InputError):
            return row
        readable.append(row)
    return torch.stack([p for p, _ in readable]), torch.tensor([label for _, label in readable])


def _load(
    split: Sequence[tuple[Image.Image, int]], transform: Transform, batches: list[list[AugmentedIndex]],
    workers: int,
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """Yields pixels (m, 3, H, W) and labels (m,) of batches.

    Args:
        split: images and labels.
        transform: from an image to pixels.
        batches: what is drawn, batch by batch.
        workers: processes that read images.

    Raises:
        InputError: if an image cannot be read.
    """
    data = Pictures(split, transform)
    for batch in DataLoader(data, batch_sampler=batches, collate_fn=_collate, num_workers=workers):
        if isinstance(batch, InputError):
            raise batch
        yield batch


def train_batches(
    task: StreamTask, clip: Clip, batches: list[list[int]], first: int, key: Sequence[int],
    rank: int = 0, world: int = 1, workers: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """Yields this process's share of each step from `first` on: pixels (m, 3, H, W), labels (m,).

    All processes get as many rows; those that only pad have the label -1.

    Args:
        task: whose training images are read.
        clip: for its transform and its device.
        batches: indices of each step's images, as `plan` gives them.
        first: the first step to yield.
        key: of the augmentation's random generator.
        rank: of this process.
        world: number of processes.
        workers: processes that load images.

    Raises:
        InputError: if an image cannot be read, or a label is none of the task's classes.
    """
    of_this_process: list[list[AugmentedIndex]] = []
    for step, batch in enumerate(batches[first:], first):
        seeds = np.random.SeedSequence([*key, step]).generate_state(len(batch)).tolist()
        draws = list(zip(batch, seeds, strict=True))[rank::world]
        lacking = -(-len(batch) // world) - len(draws)
        of_this_process.append(draws + [(batch[0], PADDING)] * lacking)
    augmented = [[(index, max(seed, 0)) for index, seed in draws] for draws in of_this_process]
    loaded = _load(task.train, clip.train_transform, augmented, workers)
    for draws, (pixels, labels) in zip(of_this_process, loaded, strict=True):
        if not 0 <= int(labels.min()) <= int(labels.max()) < len(task.classes):
            known = f"0 to {len(task.classes) - 1}"
            raise InputError(f"{task.name!r} has a label outside its classes; give {known}")
        real = torch.tensor([seed != PADDING for _, seed in draws])
        yield pixels.to(clip.device), labels.where(real, PADDING).to(clip.device)


def eval_batches(
    split: Sequence[tuple[Image.Image, int]], clip: Clip, batch: int,
    rank: int = 0, world: int = 1, workers: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """Yields every world-th image of a split in order, not augmented: pixels (m, 3, H, W), labels
    (m,).

    Args:
        split: images and labels.
        clip: for its transform and its device.
        batch: images at a time.
        rank: of this process.
        world: number of processes.
        workers: processes that load images.
    """
    draws = [(index, 0) for index in range(len(split))][rank::world]
    parts = [draws[at : at + batch] for at in range(0, len(draws), batch)]
    for pixels, labels in _load(split, clip.eval_transform, parts, workers):
        yield pixels.to(clip.device), labels.to(clip.device)


class KeptBatches:
    """Test images that are transformed once for all evaluations of a run, as far as they fit.

    Args:
        limit: bytes of pixels that are kept in all; a task that does not fit is read anew each time.
    """

    def __init__(self, limit: int = 256 * 2**20) -> None:
        self.left = limit
        self.kept: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def of(
        self, number: int, images: int, batches: Iterator[tuple[Tensor, Tensor]]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the batches of a task, kept ones where there are any.

        Args:
            number: of the task.
            images: how many this process reads of it.
            batches: what reads them.
        """
        if number in self.kept:
            yield from self.kept[number]
            return
        read, size = list[tuple[Tensor, Tensor]](), 0
        for pixels, labels in batches:
            size = size or images * pixels[0].nbytes
            if size <= self.left:
                read.append((pixels, labels))
            yield pixels, labels
        if read:
            self.kept[number] = read
            self.left -= size


def check_stream_tasks(tasks: Sequence[StreamTask]) -> None:
    """Refuses tasks that cannot be trained and tested.

    Raises:
        InputError: for no task, names that are given twice, or a task without images.
    """
    check_task_names(tasks)
    for task in tasks:
        for split in ("train", "test"):
            if not len(getattr(task, split)):
                raise InputError(f"task {task.name!r} has no images in its {split} split")


def prompts(task: StreamTask, template: int = 0) -> list[str]:
    """Returns the class prompts of a task, from one of its templates."""
    return [task.templates[template].replace("{}", name) for name in task.classes]


def task_facts(task: StreamTask) -> dict[str, Any]:
    """Returns what identifies a task in the record of a run."""
    drawn = [getattr(split, "indices", None) for split in (task.train, task.test)]
    names = json.dumps([task.classes, task.templates, drawn])
    return {
        "name": task.name,
        "classes": len(task.classes),
        "train": len(task.train),
        "test": len(task.test),
        "digest": hashlib.sha256(names.encode()).hexdigest()[:16],
    }
