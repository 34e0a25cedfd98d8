"""Class-incremental streams: the classes of one data set in steps, tested among those seen so far."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from vlm_prune.continual.streams.base import Labeled, LabeledImages, StreamTask
from vlm_prune.continual.streams.names import table
from vlm_prune.continual.streams.stream import Stream, few_shot, labels_of
from vlm_prune.continual.streams.torchvision_sets import torchvision_task
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.paths import DataRoot

ORDER_SEED = 1993


class ImagesOfClasses(LabeledImages):
    """The images of some classes of a split, labeled by their order among these classes.

    Args:
        split: with all classes.
        classes: labels in the split.
    """

    def __init__(self, split: Sequence[Labeled], classes: Sequence[int]) -> None:
        self.split = split
        renumbered = {label: number for number, label in enumerate(classes)}
        labels = labels_of(split)
        self.chosen = [index for index, label in enumerate(labels) if label in renumbered]
        self.labels = [renumbered[labels[index]] for index in self.chosen]

    def __len__(self) -> int:
        return len(self.chosen)

    def item(self, index: int) -> Labeled:
        return self.split[self.chosen[index]][0], self.labels[index]


def class_increments(
    task: StreamTask, steps: int, order: Sequence[int] | None = None
) -> tuple[StreamTask, ...]:
    """Returns the classes of a task as tasks of equally many classes each, named `step-1` and so on.

    Args:
        task: the data set.
        steps: number of tasks.
        order: its labels in the order in which they are learned; that of the data set by default.

    Raises:
        InputError: if `steps` does not divide the number of classes, or `order` is no order of them.
    """
    count = len(task.classes)
    chosen = list(range(count) if order is None else order)
    if steps < 1 or count % steps:
        raise InputError(f"{count} classes of {task.name} cannot be learned in {steps} equal steps")
    if sorted(chosen) != list(range(count)):
        raise InputError(f"an order of {task.name} names each label from 0 to {count - 1} once")
    size = count // steps
    parts = [chosen[start : start + size] for start in range(0, count, size)]
    return tuple(
        replace(
            task,
            name=f"step-{number}",
            classes=tuple(task.classes[label] for label in labels),
            train=ImagesOfClasses(task.train, labels),
            val=ImagesOfClasses(task.val, labels),
            test=ImagesOfClasses(task.test, labels),
        )
        for number, labels in enumerate(parts, 1)
    )


def cifar100_increments(
    root: Path | DataRoot,
    shots: int | None = None,
    seed: int = 0,
    skip_bad: bool = False,
    steps: int = 10,
) -> Stream:
    """Opens CIFAR-100 in steps of 10 classes, in the order of iCaRL, PyCIL and C3Box.

    https://arxiv.org/abs/2601.20852

    The order is NumPy's permutation with the seed 1993 of the labels, which are alphabetical. A
    test image is scored against the classes seen so far.

    Args:
        root: folder with a copy that `torchvision_task` reads.
        shots: training images per class; all of them by default.
        seed: of the shots.
        skip_bad: leave out images that cannot be read.
        steps: number of tasks.
    """
    task = torchvision_task("cifar100", root, skip_bad)
    own = {name: label for label, name in enumerate(task.classes)}
    names = table()["cifar100"].classes
    order = np.random.RandomState(ORDER_SEED).permutation(len(own))
    tasks = class_increments(task, steps, [own[names[number]] for number in order])
    if shots is not None:
        tasks = tuple(few_shot(one, shots, seed) for one in tasks)
    return Stream(f"cifar100-{steps}", tasks, joint=True, ensemble=False, seen_only=True)
