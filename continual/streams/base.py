"""What every stream consists of: named classification data sets in an order."""

import logging
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

from PIL import Image

from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.renamed import renamed_names

logger = logging.getLogger(__name__)
Labeled = tuple[Image.Image, int]
__getattr__ = renamed_names(
    __name__,
    {"Labelled": "Labeled", "LabelledImages": "LabeledImages", "Task": "StreamTask"},
)


class LabeledImages(Sequence[Labeled]):
    """Images with labels, one made or read at a time; a slice makes all of its own."""

    @abstractmethod
    def item(self, index: int) -> Labeled:
        """Returns the image and label at one index."""

    @overload
    def __getitem__(self, index: int) -> Labeled: ...
    @overload
    def __getitem__(self, index: slice) -> list[Labeled]: ...
    def __getitem__(self, index: int | slice) -> Labeled | list[Labeled]:
        if isinstance(index, slice):
            return [self.item(k) for k in range(*index.indices(len(self)))]
        return self.item(index)


def readable_indices(split: Sequence[Labeled]) -> list[int]:
    """Returns the indices of the items that can be read; each of the
    others is named in a warning.
    """
    good = list[int]()
    for index in range(len(split)):
        try:
            split[index]
            good.append(index)
        except InputError as error:
            logger.warning("left out: %s", error)
    return good


@dataclass(frozen=True)
class StreamTask:
    """A named classification data set: class names, prompt templates, and three splits.

    Args:
        name: of the data set.
        classes: names by label.
        templates: prompts with one `{}` each; the first is the training prompt.
        train: map-style, images are read when an item is asked for; so are the other two.
        val: for choosing hyperparameters.
        test: for the accuracy matrix.

    Raises:
        InputError: if there are no classes, if one is empty or named twice, or if a template has
            not exactly one `{}`.
    """

    name: str
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    train: Sequence[Labeled]
    val: Sequence[Labeled]
    test: Sequence[Labeled]

    def __post_init__(self) -> None:
        check_classes(self.name, self.classes)
        if not self.templates:
            raise InputError(
                f"{self.name} has no prompt template; give one such as 'a photo of a {{}}.'"
            )
        for template in self.templates:
            if template.count("{}") != 1:
                raise InputError(f"template {template!r} of {self.name} needs exactly one {{}}")


def check_task_names(tasks: Sequence[StreamTask]) -> None:
    """Raises `InputError` unless there are tasks, no two of them with one name."""
    names = [task.name for task in tasks]
    if not names:
        raise InputError("there are no tasks; give at least one")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"two tasks are named {twice!r}; rename one")


def check_classes(name: str, classes: Sequence[str]) -> None:
    """Raises `InputError` unless there are class names, none of them blank or used twice."""
    if not classes:
        raise InputError(f"{name} has no classes; give at least one class name")
    seen: dict[str, int] = {}
    for label, text in enumerate(classes):
        if not text.strip():
            raise InputError(f"class {label} of {name} has an empty name; give every class a name")
        if text in seen:
            both = f"{seen[text]} and {label}"
            raise InputError(f"classes {both} of {name} are both named {text!r}; rename one")
        seen[text] = label
