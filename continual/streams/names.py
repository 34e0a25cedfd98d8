"""The packaged table of class names and templates.

Names and evaluation templates are those that CLIP was published with
(https://github.com/openai/CLIP, `data/prompts.md`), in the order of each data set's labels;
Caltech101 is without its background. `x-tail template` is the one prompt per data set of the
X-TAIL protocol. 1,201 classes in all.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.registry import Registry

VERSION = 1
# data sets whose own names differ from the table's in spelling alone
_SAME_NAMES = ("aircraft", "cifar100", "dtd", "food101", "pets", "sun397")


@dataclass(frozen=True)
class Names:
    """Class names by label, templates for an ensemble, and X-TAIL's single template."""

    classes: tuple[str, ...]
    templates: tuple[str, ...]
    x_tail: str


@cache
def table() -> Registry[Names]:
    """Returns every data set of the table, by its short name."""
    text = files(__package__).joinpath("tables/names.json").read_text(encoding="utf-8")
    entries = json.loads(text)["datasets"]
    return Registry(
        "data set",
        {
            key: Names(tuple(e["classes"]), tuple(e["templates"]), e["x-tail template"])
            for key, e in entries.items()
        },
    )


def in_own_order(key: str, given: Sequence[str]) -> tuple[str, ...]:
    """Returns the table's names in the order in which a copy of the data set lists its classes.

    Raises:
        InputError: if the copy has another number of classes, or one that the table lacks.
    """
    names = table()[key].classes
    if len(given) != len(names):
        raise InputError(
            f"{key} has {len(names)} classes but this copy has {len(given)}; get the full one"
        )
    if key not in _SAME_NAMES:
        return names
    spelled = {_spelling(name): name for name in names}
    for name in given:
        if _spelling(name) not in spelled:
            raise InputError(f"class {name!r} is none of {key}; check that the copy is {key}")
    return tuple(spelled[_spelling(name)] for name in given)


def _spelling(name: str) -> str:
    for mark in "_/-":
        name = name.replace(mark, " ")
    return " ".join(name.lower().split())
