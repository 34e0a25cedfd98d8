"""Rows of the files that benchmarks come in: parquet, JSON lines, CSV, TSV, a zip of CSVs."""

import base64
import binascii
import csv
import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm_prune.vlm.common.errors import InputError, first_line
from vlm_prune.vlm.common.paths import DataRoot

FileRow = dict[str, Any]
LONGEST_NAME = 250
SUFFIXES = (".parquet", ".jsonl", ".json", ".csv", ".tsv", ".zip")
IMAGE_COLUMNS = tuple(f"image_{n}" for n in range(1, 8)) + ("image",)


def read_source_rows(path: Path, images: bool) -> Iterator[FileRow]:
    """Yields every row of a file; of parquet without the image columns unless `images`.

    Rows of CSVs have the file's name as `subject`, since CMMLU has one file for each.

    Raises:
        InputError: if the file cannot be read, or parquet support is not installed.
    """
    try:
        if path.suffix == ".parquet":
            yield from _parquet(path, images)
        elif path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                for name in sorted(archive.namelist()):
                    if name.endswith(".csv") and "test/" in name:
                        text = io.TextIOWrapper(archive.open(name), "utf-8-sig", newline="")
                        yield from _table(text, ",", Path(name).stem)
        elif path.suffix in (".csv", ".tsv"):
            with path.open(encoding="utf-8-sig", newline="") as file:
                yield from _table(file, "," if path.suffix == ".csv" else "\t", path.stem)
        elif path.suffix == ".json":
            yield from json.loads(path.read_text(encoding="utf-8"))
        else:
            with path.open(encoding="utf-8") as file:
                yield from (json.loads(line) for line in file if line.strip())
    except InputError:
        raise
    except (OSError, ValueError, TypeError, RecursionError, csv.Error, zipfile.BadZipFile) as error:
        raise InputError(f"cannot read {path}: {first_line(error)}") from error


def _parquet(path: Path, images: bool) -> Iterator[FileRow]:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise InputError("parquet files need pyarrow: pip install 'vlm-prune[iit]'") from None
    file = ParquetFile(path)
    names = [n for n in file.schema_arrow.names if images or n not in IMAGE_COLUMNS]
    for batch in file.iter_batches(batch_size=64, columns=names):
        yield from batch.to_pylist()


def _table(file: Any, delimiter: str, subject: str) -> Iterator[FileRow]:
    csv.field_size_limit(2**31 - 1)  # images are base64 in cells
    for row in csv.DictReader(file, delimiter=delimiter):
        yield {"subject": subject} | row


def image_bytes(value: Any, root: DataRoot) -> bytes:
    """Returns the file content of an image cell: `{"bytes"}`, a list of
    one, base64, or a file name.

    Raises:
        InputError: if it is none of these, or the file is outside of the data.
    """
    if isinstance(value, list) and len(value) == 1:
        (value,) = value
    if isinstance(value, dict):
        if value.get("bytes"):
            return bytes(value["bytes"])
        value = value.get("path")
    if isinstance(value, str):
        try:
            content = base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError):
            content = b""
        # a name may look like base64, too
        named = len(value) < LONGEST_NAME and (root.folder / value).is_file()
        if named or not content:
            path = root.path(value[:LONGEST_NAME])
            content = path.read_bytes() if named else b""
        if content:
            return content
    raise InputError(
        f"a row of {root.folder} has no image that can be read, but {str(value)[:40]!r}"
    )
