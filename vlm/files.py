"""Writing files whole or not at all."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file to write in the block; it becomes `path` when the block ends well, else it goes."""
    partial = path.with_suffix(path.suffix + ".partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, content: str) -> None:
    """Write all of the file or none of it."""
    with whole(path) as partial:
        partial.write_text(content, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write all of the file or none of it."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Fill a folder beside this one, then rename it; an older one is replaced."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    fill(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)
