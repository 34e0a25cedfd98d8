"""The answers on disk: parts while the run goes on, one table in input order at the end."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import compute, parquet

from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.files import atomic_path, check_output
from vlm_prune.vlm.common.folder import (
    OutputFolder,
    check_settings,
    compare_settings,
    record_settings,
)
from vlm_prune.vlm.common.records import from_json

ANSWERS = pa.schema(
    [
        ("row", pa.int64()),
        ("answer", pa.string()),
        ("error", pa.string()),
        ("image_tokens", pa.int32()),
        ("kept_tokens", pa.int32()),
    ]
)
IMAGES = pa.schema([("row", pa.int64()), ("path", pa.string()), ("prompt", pa.string())])
ROWS = pa.schema([("row", pa.int64())])
CONFIG = b"vlm_prune.map"


def finished(output: Path, config: dict[str, Any]) -> bool:
    """Returns whether `output` is there already, from a run of this configuration.

    Raises:
        InputError: if it is something else.
    """
    check_output(output)
    if not output.exists():
        return False
    advice = "give another --output or remove it"
    try:
        noted = (parquet.read_schema(output).metadata or {})[CONFIG]
    except (KeyError, pa.ArrowException):
        raise InputError(f"{output} is there and no table of map; {advice}") from None
    found = from_json(noted, dict[str, Any], f"the configuration in {output}", advice)
    compare_settings(output, found, config)
    return True


class Parts:
    """`out.parquet.parts`: the images as they were found first, and the answers so far.

    Args:
        output: the table to be.
        config: what decides the answers.
        find: gives the images, if none were noted yet.

    Raises:
        InputError: if another run writes there, or one with another configuration did.
    """

    def __init__(self, output: Path, config: dict[str, Any], find: Callable[[], pa.Table]) -> None:
        self.output, self.config, self.folder = output, config, parts_of(output)
        self.lock = OutputFolder(self.folder)
        with self.lock.releasing():
            self._open(find)

    def _open(self, find: Callable[[], pa.Table]) -> None:
        listed, settings = self.folder / "images.parquet", self.folder / "config.json"
        known = check_settings(settings, self.config)
        if not known and self._files():
            raise InputError(f"{self.folder} holds answers without config.json; remove it")
        # images noted by a run that ended before its settings were may be those of other settings
        if not (known and listed.is_file()):
            found = find()
            with atomic_path(listed) as partial:
                parquet.write_table(found, partial)
        record_settings(settings, self.config)
        self.images = _read(listed, IMAGES)
        self.done = np.zeros(len(self.images), bool)
        for part in self._files():
            self.done[_rows_of(part, len(self.images))] = True

    @property
    def log(self) -> Path:
        """Returns the file for what Ray says about itself."""
        return self.folder / "ray.log"

    def missing(self) -> pa.Table:
        """Returns the images without an answer or an error."""
        return self.images.filter(pa.array(~self.done))

    def write(self, answers: list[pa.Table]) -> None:
        """Writes one more part, whole; rows that are there already are left out."""
        table = pa.concat_tables(answers)
        rows = table["row"].to_numpy()
        first = np.zeros(len(rows), bool)
        first[np.unique(rows, return_index=True)[1]] = True
        table = table.filter(pa.array(first & ~self.done[rows]))
        if len(table):
            number = max((int(file.stem.split("-")[1]) for file in self._files()), default=0) + 1
            with atomic_path(self.folder / f"part-{number:06d}.parquet") as partial:
                parquet.write_table(table, partial)
            self.done[rows] = True

    def join(self) -> None:
        """Writes the output whole, then removes the parts."""
        answers = pa.concat_tables([_read(part, ANSWERS) for part in self._files()])
        answers = answers.sort_by("row")
        if answers["row"].to_numpy().tolist() != list(range(len(self.images))):
            raise InputError(f"{self.folder} is damaged; remove it")
        table = self.images.drop_columns("row")
        for field in list(ANSWERS)[1:]:
            table = table.append_column(field, answers[field.name])
        noted = json.dumps(self.config).encode()
        with atomic_path(self.output) as partial:
            parquet.write_table(table.replace_schema_metadata({CONFIG: noted}), partial)
        self.discard()

    def discard(self) -> None:
        """Removes the folder of parts."""
        shutil.rmtree(self.folder)
        self.lock.release()

    def release(self) -> None:
        """Lets another run go on."""
        self.lock.release()

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.parquet"))


def parts_of(output: Path) -> Path:
    """Returns the folder beside `output` that holds its parts."""
    return output.with_name(output.name + ".parts")


def _rows_of(part: Path, images: int) -> NDArray[np.int64]:
    """Returns the numbers of the rows that a part answers, and refuses those
    that are not below `images`.
    """
    rows = _read(part, ROWS)["row"]
    ends = compute.min_max(rows).as_py()
    if len(rows) and (rows.null_count or ends["min"] < 0 or ends["max"] >= images):
        raise InputError(f"{part} is damaged; remove {part.parent}")
    found: NDArray[np.int64] = rows.to_numpy()
    return found


def _read(path: Path, schema: pa.Schema) -> pa.Table:
    try:
        return parquet.read_table(path, columns=schema.names).select(schema.names).cast(schema)
    except (pa.ArrowException, KeyError) as error:
        raise InputError(f"{path} is damaged; remove {path.parent}") from error
