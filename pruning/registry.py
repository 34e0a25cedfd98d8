"""Pruners by name: ours, those of other packages, and names joined by `+`."""

import os
import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from difflib import get_close_matches
from functools import lru_cache
from importlib.metadata import entry_points
from typing import Any

from vlm_prune.pruning.attention import ATTENTION, with_attention
from vlm_prune.pruning.schedule import check_layer, entering
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.registry import Registry


def methods() -> Registry[Any]:
    """Returns every registered pruner: ours and those of packages with a `vlm_prune.methods` entry
    point, packages installed since the last call included.
    """
    table: Registry[Any] = Registry("method")
    for entries in _entry_points(tuple(map(_folder_state, sys.path))):
        for name, pruner in entries.items():
            table.register(name, pruner)
    return table


def _folder_state(path: str) -> tuple[str, int]:
    """Returns a folder and when it changed, which installing a package into it does."""
    try:
        return path, os.stat(path or ".").st_mtime_ns
    except OSError:
        return path, 0


@lru_cache(maxsize=1)
def _entry_points(_: tuple[tuple[str, int], ...]) -> list[Mapping[str, Any]]:
    """Returns what each entry point names: a mapping that may grow later."""
    return [point.load() for point in entry_points(group="vlm_prune.methods")]


OPTIONS = ("budget", "positions", "seed")


def check_own(arguments: Mapping[str, Any]) -> None:
    """Raises `InputError` if an argument of a method is what every method has, given elsewhere."""
    if shared := [name for name in OPTIONS if name in arguments]:
        raise InputError(f"{shared[0]} is no hyperparameter but an option; give --{shared[0]}")


def build(name: str, **hyperparameters: Any) -> Any:
    """Builds a pruner by its registered name, or several joined by `+`.

    `a+b` is the cascade of a, before the language model, and b, inside it; `+merge` averages what
    the method in front of it drops into what that keeps, `+restore` into anchors beside it. `b@16`
    is b as one cut after 16 of 32 decoder layers; in a cascade it leaves a third of the tokens that
    enter. `icr+` in front of all of them leaves the images that matter to the question. `+xattention`, or another
    method of sparse attention, comes last. Hyperparameters are
    those of the whole; those of a part are named after it, `inside.layer` (parts of a cascade are
    `pre` and `inside`, that of a merge before the language model and of `icr` is `method`, sparse attention
    is `attention`).

    Raises:
        InputError: if a name is unknown or two methods do not go together.
    """
    table = methods()
    first, *more = name.split("+")
    if first in table and not more and not any("." in key for key in hyperparameters):
        _check_names(table[first], hyperparameters)
        return table[first](**hyperparameters)
    sparse = more.pop() if more and more[-1] not in table and more[-1] in ATTENTION else ""
    if more and first in table and hasattr(table[first], "in_front_of"):
        # chooses images for all parts behind it
        pruner = table[first].in_front_of(_joined(table, *more))
    else:
        pruner = _joined(table, first, *more)
    if sparse:
        pruner = with_attention(pruner, ATTENTION[sparse]())
    return _replaced(pruner, hyperparameters)


def _joined(table: Registry[Any], first: str, *more: str) -> Any:
    pruner = _part(table, first)
    for part in more:
        if part in table and hasattr(table[part], "around"):
            pruner = table[part].around(pruner)
        else:
            late = {"widening": entering(_layer(part))} if "@" in part else {}
            pruner = table["cascade"](pruner, _part(table, part), **late)
    return pruner


def _part(table: Registry[Any], name: str) -> Any:
    method, late, _ = name.partition("@")
    return table[method].at_layer(_layer(name)) if late else table[method]()


def _layer(name: str) -> int:
    layer = name.partition("@")[2]
    if not layer.isdecimal():
        raise InputError(
            f"{name} names no decoder layer; give how many of 32 have run, as in apet@16"
        )
    check_layer(int(layer))
    return int(layer)


def _replaced(pruner: Any, hyperparameters: dict[str, Any]) -> Any:
    direct = {key: value for key, value in hyperparameters.items() if "." not in key}
    inner: dict[str, dict[str, Any]] = {}
    for key in hyperparameters.keys() - direct.keys():
        part, _, rest = key.partition(".")
        inner.setdefault(part, {})[rest] = hyperparameters[key]
    for part, values in inner.items():
        if not is_dataclass(getattr(pruner, part, None)):
            raise InputError(f"{type(pruner).__name__} has no part {part!r}")
        direct[part] = _replaced(getattr(pruner, part), values)
    _check_names(type(pruner), direct)
    return replace(pruner, **direct)


def _check_names(method: type[Any], hyperparameters: Mapping[str, Any]) -> None:
    """Raises `InputError` for a hyperparameter that the method does not have."""
    known = [field.name for field in fields(method) if field.init]
    own_names = [name for name in known if name not in OPTIONS]
    for name in hyperparameters:
        if name not in known:
            near = get_close_matches(name, own_names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            listed = ", ".join(own_names) or "none"
            raise InputError(
                f"{method.__name__} has no hyperparameter {name!r}{hint} (it has {listed})"
            )
