"""Views with equal pixels, such as blank tiles of a page, pass through the vision tower once."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput


def first_equal(rows: Tensor) -> Tensor:
    """Returns for each row the number of the first one that equals it, (R, ...) -> (R,)."""
    kind = rows.flatten(1).unique(dim=0, return_inverse=True)[1]
    index = torch.arange(len(rows), device=rows.device)
    # of each kind the least index: kinds are fewer than rows, so the rest stays at R
    first = index.new_full((len(rows),), len(rows)).scatter_reduce(0, kind, index, "amin")
    return first[kind]


@dataclass
class DistinctViews:
    """What the tower got in place of all its views.

    Args:
        source: number of each view among those that the tower got, (T,); None while all differ.
    """

    source: Tensor | None = None

    def expanded(self, value: Any) -> Any:
        """Returns what the tower gave with the rows of all views, in nested tensors (t, ...)."""
        if self.source is None:
            return value
        if isinstance(value, Tensor):
            return value[self.source]
        if isinstance(value, tuple):
            return tuple(map(self.expanded, value))
        if isinstance(value, ModelOutput):
            return type(value)(**{name: self.expanded(part) for name, part in value.items()})
        return value

    def chosen(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Returns the tower's arguments with distinct views alone, and notes which these are.

        Args:
            arguments: of the tower; tensors with as many rows as `pixel_values` belong to views.
        """
        pixels = arguments["pixel_values"]
        views = {
            name: value
            for name, value in arguments.items()
            if isinstance(value, Tensor) and value.ndim and len(value) == len(pixels)
        }
        # views are equal where all that belongs to them is
        equal = torch.stack([first_equal(value) for value in views.values()], 1)
        distinct, self.source = first_equal(equal).unique(return_inverse=True)
        if len(distinct) == len(pixels):
            self.source = None
            return arguments
        return arguments | {name: value[distinct] for name, value in views.items()}


@contextmanager
def distinct_views(tower: nn.Module | None) -> Iterator[DistinctViews]:
    """Lets a tower encode views of equal pixels once, in this thread, while open.

    Args:
        tower: takes `pixel_values` (T, ...), whose rows do not see each other; nothing happens
            where it is None.
    """
    views, thread = DistinctViews(), get_ident()
    if tower is None:
        yield views
        return

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if get_ident() != thread:
            return None
        given = dict(zip(("pixel_values",), args, strict=False)) | kwargs
        return args[1:], views.chosen(given)

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        return views.expanded(output) if get_ident() == thread else None

    handles = (
        tower.register_forward_pre_hook(before, with_kwargs=True),
        tower.register_forward_hook(after),
    )
    try:
        yield views
    finally:
        for handle in handles:
            handle.remove()
