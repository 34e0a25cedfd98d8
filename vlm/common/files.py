"""Files: read only where they are regular, written whole or not at all."""

import json
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from vlm_prune.vlm.common.errors import InputError, first_line

MOST_BYTES, MOST_JSON = 2**28, 2**26
PARTIAL = ".partial"
LEFTOVER_SECONDS = 600.0


def open_regular(path: Path) -> BinaryIO:
    """Opens a file for reading; the caller closes it.

    Raises:
        InputError: if it is missing, a folder, a device, a pipe or a socket, or must not be read.
    """
    try:
        # a pipe that nobody writes to must not block
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot read {path}: {reason}") from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise InputError(f"cannot read {path}: it is {_kind(mode)}, not a file")
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """Returns the content of a file.

    Raises:
        InputError: as `open_regular` does, or if the file has more than `most` bytes.
    """
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise InputError(f"cannot read {path}: it has more than {most / 1e6:.0f} MB")
    return content


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """Returns the content of a UTF-8 file; raises `InputError` as
    `read_bytes` does, or if it is no text.
    """
    try:
        return read_bytes(path, most).decode("utf-8")
    except UnicodeDecodeError:
        raise InputError(f"cannot read {path}: it is not UTF-8 text") from None


def read_json(path: Path) -> Any:
    """Returns the content of a JSON file that is not ours, as plain values.

    Raises:
        InputError: as `read_bytes` does, or if the file is no JSON in UTF-8 or nested deeper than
            Python reads.
    """
    try:
        return json.loads(read_text(path, MOST_JSON))
    except InputError:
        raise
    except RecursionError:
        raise InputError(f"{path} is nested too deeply") from None
    except ValueError as error:
        raise InputError(f"cannot read {path} as JSON: {first_line(error)}") from error


def read_object(path: Path) -> dict[str, Any]:
    """Returns the JSON object that a file holds.

    Raises:
        InputError: as `read_json` does, or if the file holds another kind of value.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} holds {_shape(content)} where a JSON object is expected")
    return content


def _shape(content: Any) -> str:
    """Returns the word for a JSON value in messages, such as `a list`."""
    if content is None or isinstance(content, bool):
        return json.dumps(content)
    if isinstance(content, list | str):
        return "a list" if isinstance(content, list) else "a text"
    return "a number"


def output_file(path: Path) -> Path:
    """Returns the file that writing to `path` will replace or make; links are followed.

    Raises:
        InputError: if `path` names no file, or something there is neither a file nor absent.
    """
    target = Path(os.path.realpath(path))
    if not path.name or target == target.parent or target.is_dir():
        raise InputError(f"{str(path)!r} is a folder; give the name of a file")
    if target.is_symlink():  # realpath stops where links form a loop
        raise InputError(f"{path} is a link that leads nowhere; give another name")
    if target.exists() and not target.is_file():
        raise InputError(
            f"{path} is {_kind(target.stat().st_mode)}; give the name of a regular file"
        )
    return target


def output_folder(path: Path) -> Path:
    """Returns the folder for results that `path` names, which need not be
    there yet; links are followed.

    Raises:
        InputError: if it is the working folder (what an empty name means, too), the root of the
            file system, or no folder.
    """
    target = Path(os.path.realpath(path))
    if target == Path.cwd() or target == target.parent:
        raise InputError(
            f"the output {str(path)!r} is no folder of its own; give one such as runs/one"
        )
    if target.is_symlink():  # realpath stops where links form a loop
        raise InputError(f"{path} is a link that leads nowhere; give another name")
    if target.exists() and not target.is_dir():
        raise InputError(f"{path} is {_kind(target.stat().st_mode)}; give a folder")
    return target


def check_output(path: Path) -> None:
    """Finds out before any work whether a file can be written at `path`; leaves nothing behind.

    Raises:
        InputError: as `output_file` and `make_folders` do.
        OSError: if its folder cannot be made or written to.
    """
    target = output_file(path)
    new_folders = make_folders(target.parent)
    try:
        _new_partial(target).unlink()
    finally:
        for folder in reversed(new_folders):
            folder.rmdir()


def check_outputs(folder: Path, names: Iterable[str]) -> None:
    """Finds out before any work whether files can be written in a folder of results.

    Raises:
        InputError: as `output_folder` and `output_file` do.
        OSError: if the folder cannot be made or written to.
    """
    output_folder(folder)
    for name in names:
        check_output(folder / name)


def make_folders(path: Path) -> list[Path]:
    """Makes a folder and those above it; returns the ones that were not there, outermost first.

    Raises:
        InputError: if what is there is no folder.
        OSError: if a folder cannot be made.
    """
    missing: list[Path] = []
    for folder in (path, *path.parents):
        if folder.is_dir():
            break
        if folder.exists():
            raise InputError(f"{folder} is {_kind(folder.stat().st_mode)}, not a folder")
        missing.insert(0, folder)
    path.mkdir(parents=True, exist_ok=True)
    return missing


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Gives a file to write in the block; it becomes `path` when the block ends well, else it goes.

    Its name is the block's own, so that two writers do not meet. Folders above `path` are made, a
    link is followed, and the file is on the disk when the block has ended.

    Raises:
        InputError: as `output_file` and `make_folders` do.
    """
    target = output_file(path)
    make_folders(target.parent)
    _remove_leftovers(target)
    partial = _new_partial(target)
    try:
        yield partial
        if target.exists():
            partial.chmod(stat.S_IMODE(target.stat().st_mode))
        _flush(partial)
        partial.replace(target)
        _flush_names(target.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, content: str) -> None:
    """Writes all of the file or none of it."""
    with atomic_path(path) as partial:
        partial.write_text(content, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Writes records, dataclasses and plain values as `read_json` reads them, or nothing."""
    values = msgspec.to_builtins(content, str_keys=True, enc_hook=plain)
    write_text(path, json.dumps(values, indent=2) + "\n")


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Fills a folder beside this one, then renames it; an older one is replaced.

    Raises:
        InputError: as `output_folder` does, or if `folder` is a link.
    """
    if folder.is_symlink():
        raise InputError(f"{folder} is a link and no folder; remove it, or give another name")
    output_folder(folder)
    make_folders(folder.parent)
    _remove_leftovers(folder)
    partial = _partial_name(folder)
    partial.mkdir()
    try:
        fill(partial)
        for file in partial.rglob("*"):
            if file.is_file():
                _flush(file)
        if folder.exists():
            old = _partial_name(folder)
            folder.replace(old)
            partial.replace(folder)
            shutil.rmtree(old)
        else:
            partial.replace(folder)
        _flush_names(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _partial_name(target: Path) -> Path:
    """Returns a name of this process alone beside `target`, short enough for any file system."""
    unique = f"{os.getpid()}-{secrets.token_hex(4)}"
    return target.with_name(f".{target.name[:40]}.{unique}{PARTIAL}")


def _new_partial(target: Path) -> Path:
    partial = _partial_name(target)
    os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    return partial


def _remove_leftovers(target: Path) -> None:
    """Removes what processes that were killed while they wrote to `target` left beside it.

    A process of another machine may still write, so what changed a moment ago stays.
    """
    start = f".{target.name[:40]}."
    for path in target.parent.iterdir():
        if not (path.name.startswith(start) and path.name.endswith(PARTIAL)):
            continue
        number = path.name[len(start) :].partition("-")[0]
        with suppress(OSError):
            old = time.time() - path.stat().st_mtime > LEFTOVER_SECONDS
            if old and number.isdecimal() and not _runs(int(number)):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _runs(process: int) -> bool:
    """Returns whether there is a process of that number on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _flush(path: Path) -> None:
    """Waits until a file is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_names(folder: Path) -> None:
    """Waits until the names in a folder are on the disk, where the file system can tell."""
    with suppress(OSError):
        _flush(folder)


def _kind(mode: int) -> str:
    """Returns the word for a kind of file in messages, such as `a folder`, given its mode."""
    for is_kind, name in (
        (stat.S_ISREG, "a file"),
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISSOCK, "a socket"),
    ):
        if is_kind(mode):
            return name
    return "a device"


def plain(value: Any) -> Any:
    """Returns what JSON takes for numpy's numbers, and the text of anything else."""
    return value.item() if hasattr(value, "item") else str(value)
