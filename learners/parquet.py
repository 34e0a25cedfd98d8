"""Conversations and pictures in Parquet files, as data sets on model hubs are published."""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

from vlm_prune.vlm.common.errors import InputError, first_line

ROWS_AT_A_TIME = 64
PICTURES = ("image", "images")


@dataclass(frozen=True)
class PackedImage:
    """A picture inside a Parquet file, read when it is opened.

    Args:
        file: the file.
        column: of the pictures.
        row: number of the row in the file.
        number: of the picture in its row.
    """

    file: Path
    column: str
    row: int
    number: int

    def open(self, mode: str = "rb") -> BinaryIO:
        """Returns the picture's bytes as an open file.

        Args:
            mode: `rb`, as a path's is.

        Raises:
            InputError: if the file cannot be read any more.
        """
        try:
            starts = _starts(self.file)
            group = bisect_right(starts, self.row) - 1
            shown = _pictures(self.file, self.column, group)[self.row - starts[group]].as_py()
            packed = shown if isinstance(shown, list) else [shown]
            return BytesIO(packed[self.number]["bytes"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise InputError(f"cannot read {self.file} again: {first_line(error)}") from error


def read_parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the rows of a Parquet file, pictures under `image` as LLaVA's JSON has them: a list.

    A picture is a text that names a file, or a struct of `bytes` and `path` as `datasets` writes it;
    of one with bytes a `PackedImage` stands in the list.

    Raises:
        InputError: if the file cannot be read, or pyarrow is not installed.
    """
    try:
        file = _parquet().ParquetFile(path)
        batches = file.iter_batches(batch_size=ROWS_AT_A_TIME)
        rows = (row for batch in batches for row in batch.to_pylist())
        for number, row in enumerate(rows):
            row["image"] = [
                PackedImage(path, column, number, place)
                if isinstance(value, dict) and value.get("bytes")
                else value["path"]
                if isinstance(value, dict) and "path" in value
                else value
                for column in PICTURES
                for place, value in enumerate(_listed(row.pop(column, None)))
            ]
            yield row
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {first_line(error)}") from error


def _listed(shown: Any) -> list[Any]:
    """Returns a row's pictures as a list: it has none, one, or several."""
    if shown is None:
        return []
    return shown if isinstance(shown, list) else [shown]


@lru_cache(maxsize=64)
def _starts(path: Path) -> list[int]:
    """Returns the number of the first row of each row group."""
    described = _parquet().ParquetFile(path).metadata
    groups = range(described.num_row_groups)
    return [0, *accumulate(described.row_group(group).num_rows for group in groups)][:-1]


@lru_cache(maxsize=2)
def _pictures(path: Path, column: str, group: int) -> Any:
    """Returns a column of one row group, which stays in memory for the rows beside it."""
    return _parquet().ParquetFile(path).read_row_group(group, columns=[column])[column]


def _parquet() -> Any:
    try:
        from pyarrow import parquet
    except ImportError:
        raise InputError("Parquet files need pyarrow: pip install 'vlm-prune[train]'") from None
    return parquet
