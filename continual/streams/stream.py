"""A stream of tasks, its few-shot variants, and the indices that were drawn."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from zlib import crc32

import numpy as np

from vlm_prune.continual.streams.base import Labeled, LabeledImages, StreamTask, check_task_names
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.files import write_json


@dataclass(frozen=True)
class Stream:
    """Tasks in the order in which they are learned.

    Args:
        name: of the stream.
        tasks: at least one, with different names.
        joint: whether a test image is scored against the classes of all tasks, seen or not
            (X-TAIL), or against those of its own task alone (MTIL).
        ensemble: whether class texts are means over all templates at evaluation, or the first.
        seen_only: with `joint`, leave out the classes of tasks that are not learned yet, but for those
            before the image's own task (class-incremental learning).

    Raises:
        InputError: if there is no task or two have one name.
    """

    name: str
    tasks: tuple[StreamTask, ...]
    joint: bool
    ensemble: bool
    seen_only: bool = False

    def __post_init__(self) -> None:
        check_task_names(self.tasks)

    @property
    def classes(self) -> int:
        """Returns the number of classes of all tasks together."""
        return sum(len(task.classes) for task in self.tasks)

    def ambiguous(self) -> list[str]:
        """Returns first-template prompts that two tasks share, which a
        joint test cannot tell apart.
        """
        prompts = [
            task.templates[0].replace("{}", name) for task in self.tasks for name in task.classes
        ]
        return sorted({prompt for prompt in prompts if prompts.count(prompt) > 1})


class Subset(LabeledImages):
    """Some items of a split; `indices` says which."""

    def __init__(self, split: Sequence[Labeled], indices: Sequence[int]) -> None:
        self.split, self.indices = split, tuple(indices)

    @property
    def labels(self) -> list[int]:
        labels = labels_of(self.split)
        return [labels[index] for index in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def item(self, index: int) -> Labeled:
        return self.split[self.indices[index]]


def labels_of(split: Sequence[Labeled]) -> list[int]:
    """Returns the labels of a split; images are opened only if it does not know them."""
    known = getattr(split, "labels", None)
    return list(known) if known is not None else [label for _, label in split]


def few_shot(task: StreamTask, shots: int, seed: int = 0, repeat: bool = False) -> StreamTask:
    """Returns the task with `shots` training images per class, drawn without replacement.

    Each data set has a generator of its own, from the seed and the data set's name, so that its
    images depend neither on the stream nor on the order. `Subset.indices` of the new `train`
    holds what was drawn.

    Args:
        task: to draw from.
        shots: images per class.
        seed: of the draws.
        repeat: draw images of a class that has too few of them again, as the X-TAIL code does.

    Raises:
        InputError: if `shots` is not positive, or a class has fewer images and `repeat` is off.
    """
    if shots < 1:
        raise InputError(f"{shots} shots leave {task.name} without training images; give 1 or more")
    rng = np.random.default_rng((seed, crc32(task.name.encode())))
    labels = np.array(labels_of(task.train))
    indices = list[int]()
    for label, name in enumerate(task.classes):
        of_class = np.flatnonzero(labels == label)
        if len(of_class) == 0 or (len(of_class) < shots and not repeat):
            raise InputError(
                f"class {name!r} of {task.name} has {len(of_class)} training images for {shots} shots; "
                + ("give fewer shots" if len(of_class) else "add some images")
            )
        chosen = rng.permutation(of_class)[:shots]
        if len(chosen) < shots:
            chosen = np.concatenate([chosen, rng.choice(of_class, shots - len(chosen))])
        indices += chosen.tolist()
    return replace(task, train=Subset(task.train, indices))


def write_indices(stream: Stream, path: Path) -> None:
    """Writes which training images of each task a few-shot stream uses,
    as JSON, whole or not at all.
    """
    drawn = {t.name: list(t.train.indices) for t in stream.tasks if isinstance(t.train, Subset)}
    if not drawn:
        raise InputError(f"stream {stream.name} draws no shots, so there are no indices to write")
    write_json(path, {"stream": stream.name, "train": drawn})
