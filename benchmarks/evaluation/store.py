"""A folder of results belongs to one configuration, and to one run at a time."""

import json
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.files import write_json


class _Lock(FileLock):
    """lmms-eval turns `FileLock` itself into one lock per path, which a process may take twice."""


def claim(folder: Path, config: dict[str, Any], results: str) -> FileLock:
    """Lock the folder and note `config` in it, or find there the one of an earlier run.

    Args:
        folder: made if it is not there.
        config: what decides the results, plain values.
        results: a pattern of files that are not there without a configuration.

    Returns:
        The lock; it is held as long as this object lives.

    Raises:
        InputError: if another run writes there, or one with another configuration did.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = _Lock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(
            f"another run writes to {folder}; wait for it, or give another --output"
        ) from None
    stored = folder / "config.json"
    if stored.is_file():
        try:
            found = json.loads(stored.read_text())
        except ValueError:
            found = {}
        check_same(folder, found, config)
    elif any(folder.glob(results)):
        raise InputError(f"{folder} holds results without config.json; remove the folder")
    else:
        write_json(stored, config)
    return lock


def check_same(place: Path, found: dict[str, Any], config: dict[str, Any]) -> None:
    """Raises `InputError` unless the configuration found at `place` is the one wanted."""
    wanted = json.loads(json.dumps(config))
    if set(found) != set(wanted):
        raise InputError(
            f"{place} holds a run of another version; give another --output or remove it"
        )
    changed = [key for key in wanted if found[key] != wanted[key]]
    if changed:
        raise InputError(
            f"{place} holds a run with another {', '.join(changed)}; "
            "give another --output or remove it"
        )
