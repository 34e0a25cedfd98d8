"""Rows of data sets: their values as the file says, their images by our own function.

`datasets` opens images itself, reads any path and fetches any URL that a row names, and gives a
JSON column whose values have several types other values. So columns of both kinds have features of
their own here, which `datasets` keeps through `select`, `filter` and `map`.
"""

import json
import math
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import datasets
import pyarrow as pa
from datasets.features.features import register_feature
from PIL import Image

from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.images import open_image
from vlm_prune.vlm.common.paths import DataRoot

Check = Callable[[Image.Image], None]


@dataclass
class RowImage(datasets.Image):  # type: ignore[misc]
    """An image that `open_image` opens, from the row itself or from a file of the data set.

    Args:
        folder: that files of the data set lie in; None takes none but those that rows hold.
        allow_outside: whether a row may name files outside of it.
        top: the folder that must not be left, if it is around `folder`.
    """

    folder: str | None = None
    allow_outside: bool = False
    top: str | None = None
    _type: str = field(default="VlmPruneImage", init=False, repr=False)

    def decode_example(self, value: Any, token_per_repo_id: Any = None) -> Image.Image:
        """Opens the image of a cell `{"bytes", "path"}` as RGB.

        Raises:
            InputError: if it cannot be opened, or its path is not one of the data set.
        """
        if value["bytes"] is not None:
            return open_image(BytesIO(value["bytes"]))
        if not value["path"]:
            raise InputError("a row has an image without content")
        if self.folder is None:
            raise InputError(f"a row names the file {value['path'][:200]!r} and does not hold it")
        top = None if self.top is None else Path(self.top)
        return open_image(DataRoot(Path(self.folder), self.allow_outside, top).path(value["path"]))


@dataclass
class RowJson:
    """A column whose values have several types; each is kept as its JSON text."""

    decode: bool = True
    id: str | None = field(default=None, repr=False)
    dtype: ClassVar[str] = "string"
    pa_type: ClassVar[Any] = pa.string()
    _type: str = field(default="VlmPruneJson", init=False, repr=False)

    def __call__(self) -> Any:
        return self.pa_type

    def encode_example(self, value: Any) -> str:
        """Writes a value as JSON."""
        return json.dumps(value)

    def decode_example(self, value: str | None, token_per_repo_id: Any = None) -> Any:
        return None if value is None else json.loads(value)

    def cast_storage(self, storage: Any) -> Any:
        """Returns Arrow's column of strings as it is."""
        return storage


@cache
def _register() -> None:
    """Tells `datasets` of both kinds of columns, so that it keeps them where it copies rows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it calls its own function experimental
        register_feature(RowImage, "VlmPruneImage")
        register_feature(RowJson, "VlmPruneJson")


def dataset_of_rows(rows: Sequence[dict[str, Any]]) -> datasets.Dataset:
    """Returns a data set of all columns of the rows, whose values are those of the rows."""
    _register()
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: [row.get(name) for row in rows] for name in names}
    types = {}
    for name, values in columns.items():
        try:
            array = pa.array(values)
            exact = all(map(_same, values, array.to_pylist()))
        except (pa.ArrowException, OverflowError, TypeError, ValueError):
            exact = False
        types[name] = array.type if exact else None
    schema = pa.schema([(name, kind) for name, kind in types.items() if kind is not None])
    features = dict(datasets.Features.from_arrow_schema(schema))
    features |= {name: RowJson() for name, kind in types.items() if kind is None}
    return datasets.Dataset.from_dict(
        columns, features=datasets.Features({name: features[name] for name in names})
    )


def _same(value: Any, stored: Any) -> bool:
    """Returns whether Arrow kept a value; keys that only other rows have may be there as None."""
    if isinstance(value, dict):
        return isinstance(stored, dict) and all(
            _same(value.get(key), kept) for key, kept in stored.items()
        )
    if isinstance(value, list):
        return len(value) == len(stored) and all(map(_same, value, stored))
    if isinstance(value, float) and math.isnan(value):
        return isinstance(stored, float) and math.isnan(stored)
    return type(value) is type(stored) and value == stored


def row_images(rows: datasets.Dataset, root: DataRoot, named: bool = True) -> datasets.Dataset:
    """Returns the rows with images that `RowImage` opens, and with videos and sounds left unopened.

    Args:
        rows: of any data set.
        root: its folder.
        named: whether a column `image` of texts holds names of files.
    """
    _register()
    top = None if root.top is None else str(root.top.absolute())
    image = RowImage(folder=str(root.folder.absolute()), allow_outside=root.allow_outside, top=top)
    for name, kind in rows.features.items():
        text = kind.feature if hasattr(kind, "feature") else kind
        if (
            named
            and name == "image"
            and isinstance(text, datasets.Value)
            and text.dtype == "string"
        ):
            rows = rows.cast_column(name, image if text is kind else replace(kind, feature=image))
        elif (ours := _guarded(kind, image)) != kind:
            rows = rows.cast_column(name, ours)
    return rows


def _guarded(kind: Any, image: RowImage) -> Any:
    if isinstance(kind, dict):
        return {name: _guarded(inner, image) for name, inner in kind.items()}
    if isinstance(kind, list):
        return [_guarded(inner, image) for inner in kind]
    if hasattr(kind, "feature"):
        return replace(kind, feature=_guarded(kind.feature, image))
    if isinstance(kind, datasets.Image):
        return image
    if hasattr(kind, "decode") and not isinstance(
        kind, RowJson | getattr(datasets, "Json", RowJson)
    ):
        return type(kind)(decode=False)
    return kind


def image_fields(rows: datasets.Dataset) -> list[str]:
    """Returns the columns of images or of lists of them."""
    return [name for name, kind in rows.features.items() if _shows(kind)]


def _shows(kind: Any) -> bool:
    while hasattr(kind, "feature"):
        kind = kind.feature
    return isinstance(kind, datasets.Image)


def readable(
    rows: datasets.Dataset, limit: int | None, check: Check = lambda image: None
) -> tuple[datasets.Dataset, dict[int, str]]:
    """Returns the rows without those whose images cannot be used, and by
    their numbers why they cannot.

    Args:
        rows: whose images `row_images` opens.
        limit: how many rows are going to be asked; later ones are not looked at. None for all.
        check: raises `InputError` for an image that a model does not take.

    Raises:
        InputError: if no row is left.
    """
    columns, kept, broken = image_fields(rows), list[int](), dict[int, str]()
    if not columns:
        return rows, broken
    stored = rows.select_columns(columns)
    for number in range(len(rows)):
        if len(kept) == limit:
            kept += range(number, len(rows))
            break
        try:
            for image in _flat(list(stored[number].values())):
                check(image)
            kept.append(number)
        except InputError as error:
            broken[number] = str(error)
    if not kept:
        first = next(iter(broken.values()), "there are none")
        raise InputError(f"none of its {len(rows)} rows can be read; the first: {first}")
    return (rows.select(kept) if broken else rows), broken


def _flat(value: Any) -> Iterator[Image.Image]:
    if isinstance(value, list):
        for part in value:
            yield from _flat(part)
    elif value is not None:
        yield value


def whole_groups(keys: Sequence[Hashable], limit: int) -> list[int]:
    """Returns the first rows, at most `limit`, that leave no group of equal
    keys in part, group by group.

    So those of a smaller limit are the first of those of a larger one.

    Raises:
        InputError: if already the first group has more rows.
    """
    members: dict[Hashable, list[int]] = {}
    for number, key in enumerate(keys):
        members.setdefault(key, []).append(number)
    chosen: list[int] = []
    for group in members.values():
        if len(chosen) + len(group) > limit:
            break
        chosen += group
    if not chosen:
        size = len(next(iter(members.values())))
        raise InputError(
            f"its metric needs {size} rows at once, and the limit leaves it {limit}; raise --limit"
        )
    return chosen
