"""Writing files whole or not at all."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from vlm_prune.vlm.common.errors import InputError


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


def claim(path: Path, settings: dict[str, Any], write: bool = True) -> None:
    """Note in the file what decides a run, so that another one cannot go on from its checkpoints.

    Raises:
        InputError: if the file is of a run with other settings.
    """
    text = json.dumps(settings, indent=2, default=_plain) + "\n"
    if path.is_file():
        found, ours = json.loads(path.read_text()), json.loads(text)
        changed = [key for key in found | ours if found.get(key) != ours.get(key)]
        if changed:
            raise InputError(
                f"{path.parent} holds another run, of other {', '.join(changed)}; "
                "give an empty folder, or its settings and model"
            )
    elif write:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)
