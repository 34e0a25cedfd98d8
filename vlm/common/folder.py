"""A folder of results: one writer at a time, and one set of settings."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import msgspec
from filelock import FileLock, Timeout

from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.files import make_folders, output_folder, write_text
from vlm_prune.vlm.common.records import read_record, to_json

LOCK = ".lock"


class _Lock(FileLock):
    """lmms-eval turns `FileLock` itself into one lock per path, which a process may take twice."""


class OutputFolder:
    """A folder that this process alone writes to, from now to `release` or the end of a block.

    It is made if it is not there, and goes again if nothing was written to it.

    Raises:
        InputError: if the path is no folder for results, or another process writes there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        target = output_folder(path)
        self._created = make_folders(target)
        self._lock = _Lock(target / LOCK)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise InputError(
                f"another run writes to {path}; wait for it, or give another --output"
            ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    @contextmanager
    def releasing(self) -> Iterator[None]:
        """Unlocks the folder if the block fails."""
        try:
            yield
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Unlocks the folder, so that other processes can write into it."""
        if not self._lock.is_locked:
            return
        lock = Path(self._lock.lock_file)
        if lock.exists() and [path.name for path in lock.parent.iterdir()] == [LOCK]:
            lock.unlink()
            for folder in reversed(self._created):
                if any(folder.iterdir()):
                    break
                folder.rmdir()
        self._lock.release()


def check_settings(path: Path, settings: Mapping[str, Any]) -> bool:
    """Returns whether a file of settings is there, and refuses other settings than those in it.

    Args:
        path: the file, such as `config.json`.
        settings: what decides the results that belong to them.

    Raises:
        InputError: if it is damaged, or has others.
    """
    if not path.exists():
        return False
    advice = f"give another --output or remove {path.parent}"
    compare_settings(path.parent, read_record(path, dict[str, Any], advice), settings)
    return True


def compare_settings(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises `InputError` unless the settings found in `folder`, plain values, are the ones wanted.

    Args:
        folder: where the settings were found, for the message.
        found: the settings there, plain values.
        wanted: those of this run.
    """
    plain = msgspec.json.decode(to_json(wanted))
    if found.keys() != plain.keys():
        raise InputError(
            f"{folder} holds a run of another version; give another --output or remove it"
        )
    if changed := _changed(found, plain):
        raise InputError(
            f"{folder} holds a run with another {', '.join(changed)}; "
            "give another --output or remove it"
        )


def _changed(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Returns the innermost keys whose values differ."""
    names = []
    for key, value in wanted.items():
        other = found[key]
        if isinstance(value, dict) and isinstance(other, dict) and value.keys() == other.keys():
            names += _changed(other, value)
        elif other != value:
            names.append(key)
    return names


def record_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Writes a file of settings, unless it is there.

    Raises:
        InputError: as `check_settings` does.
    """
    if not check_settings(path, settings):
        write_text(path, to_json(settings))
