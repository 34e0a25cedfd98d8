"""Rows of data sets whose images cannot be read: they are named, and the others are asked."""

from collections.abc import Iterator
from io import BytesIO
from typing import Any

import datasets

from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.images import open_image

AT_ONCE = 64


def image_columns(rows: datasets.Dataset) -> list[str]:
    """Columns of images or of lists of them."""
    return [name for name, kind in rows.features.items() if _shows(kind)]


def _shows(kind: Any) -> bool:
    while hasattr(kind, "feature"):
        kind = kind.feature
    return isinstance(kind, datasets.Image)


def readable(rows: datasets.Dataset, limit: int | None) -> tuple[datasets.Dataset, dict[int, str]]:
    """The rows without those that cannot be read, and by their numbers why they cannot.

    Args:
        limit: how many rows are going to be asked; later ones are not looked at. None for all.

    Raises:
        InputError: if no row is left.
    """
    columns, kept, broken = image_columns(rows), list[int](), dict[int, str]()
    if not columns:
        return rows, broken
    stored = rows.select_columns(columns).with_format("arrow")
    for number, images in enumerate(_one_by_one(stored)):
        if len(kept) == limit:
            kept += range(number, len(rows))
            break
        try:
            for image in images:
                open_image(image)
            kept.append(number)
        except InputError as error:
            broken[number] = str(error)
    if not kept:
        first = next(iter(broken.values()), "there are none")
        raise InputError(f"none of its {len(rows)} rows can be read; the first: {first}")
    return (rows.select(kept) if broken else rows), broken


def _one_by_one(stored: datasets.Dataset) -> Iterator[list[Any]]:
    """What `open_image` takes, for each row; decoding stays ours, as lmms-eval fills up cut images."""
    for table in stored.iter(AT_ONCE):
        for row in table.to_pylist():
            yield list(_flat(list(row.values())))


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        for part in value:
            yield from _flat(part)
    elif value is not None and value["bytes"] is not None:
        yield BytesIO(value["bytes"])
    elif value is not None and value["path"] and "://" not in value["path"]:  # inside an archive
        yield value["path"]
