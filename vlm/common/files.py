"""Reading JSON that strangers wrote, and writing files whole or not at all."""

import json
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from vlm_prune.vlm.common.errors import InputError, first_line

LARGEST_JSON = 64 * 2**20


def read_json(path: Path) -> Any:
    """Return what a JSON file holds.

    Raises:
        InputError: if the file is missing, no regular file, above 64 MiB, no JSON in UTF-8, or
            nested deeper than Python reads.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise InputError(f"{path} is no regular file")
        if found.st_size > LARGEST_JSON:
            raise InputError(f"{path} is above {LARGEST_JSON >> 20} MiB, too large for JSON")
        return json.loads(path.read_text(encoding="utf-8"))
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"there is no {path}") from None
    except RecursionError:
        raise InputError(f"{path} is nested too deeply") from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path} as JSON: {first_line(error)}") from error


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object that a file holds.

    Raises:
        InputError: as for `read_json`, or if the file holds another kind of value.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} holds {type(content).__name__} where a JSON object is expected")
    return content


class _FolderLock(FileLock):
    """A class of its own: lmms-eval turns `FileLock` itself into one lock per path and process."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder during the block; the folder is made if it is missing.

    Raises:
        InputError: if another run holds it, in this process or another one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = _FolderLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(
            f"another run writes to {folder}; wait for it, or give another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()


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
