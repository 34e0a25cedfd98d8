"""The answers on disk: parts while the run goes on, one table in input order at the end."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from vlm_prune.benchmarks.evaluation.store import check_same, claim
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.files import whole

ANSWERS = pa.schema(
    [
        ("row", pa.int64()),
        ("answer", pa.string()),
        ("error", pa.string()),
        ("image_tokens", pa.int32()),
        ("kept_tokens", pa.int32()),
    ]
)
CONFIG = b"vlm_prune.map"


def finished(output: Path, config: dict[str, Any]) -> bool:
    """Whether `output` is there already, from a run of this configuration.

    Raises:
        InputError: if it is something else.
    """
    if not output.exists():
        return False
    if output.is_dir():
        raise InputError(f"{output} is a folder; give a file such as {output / 'out.parquet'}")
    try:
        found = json.loads((parquet.read_schema(output).metadata or {})[CONFIG])
    except (KeyError, ValueError, pa.ArrowException):
        raise InputError(
            f"{output} is there and no table of map; give another --output or remove it"
        ) from None
    check_same(output, found, config)
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
        listed = self.folder / "images.parquet"
        found = None if listed.is_file() else find()
        self.lock = claim(self.folder, config, "*.parquet")
        if not listed.is_file():
            with whole(listed) as partial:
                parquet.write_table(found, partial)
        self.images = _read(listed, ["row", "path", "prompt"])
        self.done = np.zeros(len(self.images), bool)
        for part in self._files():
            self.done[_read(part, ["row"])["row"].to_numpy()] = True

    @property
    def log(self) -> Path:
        """For what Ray says about itself."""
        return self.folder / "ray.log"

    def missing(self) -> pa.Table:
        """The images without an answer or an error."""
        return self.images.filter(pa.array(~self.done))

    def write(self, answers: list[pa.Table]) -> None:
        """One more part, written whole; rows that are there already are left out."""
        table = pa.concat_tables(answers)
        rows = table["row"].to_numpy()
        first = np.zeros(len(rows), bool)
        first[np.unique(rows, return_index=True)[1]] = True
        table = table.filter(pa.array(first & ~self.done[rows]))
        if len(table):
            number = max((int(file.stem.split("-")[1]) for file in self._files()), default=0) + 1
            with whole(self.folder / f"part-{number:06d}.parquet") as partial:
                parquet.write_table(table, partial)
            self.done[rows] = True

    def join(self) -> None:
        """Write the output whole, then remove the parts."""
        answers = pa.concat_tables([_read(part, ANSWERS.names) for part in self._files()])
        answers = answers.sort_by("row")
        if answers["row"].to_numpy().tolist() != list(range(len(self.images))):
            raise InputError(f"{self.folder} is damaged; remove it")
        table = self.images.drop_columns("row")
        for field in list(ANSWERS)[1:]:
            table = table.append_column(field, answers[field.name])
        noted = json.dumps(self.config).encode()
        with whole(self.output) as partial:
            parquet.write_table(table.replace_schema_metadata({CONFIG: noted}), partial)
        self.discard()

    def discard(self) -> None:
        """Remove the folder of parts."""
        shutil.rmtree(self.folder)
        self.lock.release()

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.parquet"))


def parts_of(output: Path) -> Path:
    """The folder beside `output` that holds its parts."""
    return output.with_name(output.name + ".parts")


def _read(path: Path, columns: list[str]) -> pa.Table:
    try:
        return parquet.read_table(path, columns=columns).select(columns)
    except (pa.ArrowException, KeyError) as error:
        raise InputError(f"{path} is damaged; remove {path.parent}") from error
