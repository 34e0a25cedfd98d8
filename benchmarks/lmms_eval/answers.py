"""Answers on disk: what a killed run has, other processes give, and other runs share."""

import json
import os
import zlib
from pathlib import Path
from typing import Any

from filelock import FileLock

from vlm_prune.benchmarks.evaluation.environment import device_name, versions
from vlm_prune.learners.store import adapter_digest
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.load import EMBEDDED


def fingerprint(ask: Any, text: str) -> str:
    """A number that changes with the question, its images or how it is answered."""
    state = zlib.crc32(repr((text, sorted(ask.options.items()), ask.until, ask.forced)).encode())
    for image in ask.chat.images():
        state = zlib.crc32(image.tobytes(), zlib.crc32(repr(image.size).encode(), state))
    return f"{state:08x}"


def answered(ask: Any, text: str, reply: str) -> dict[str, Any]:
    """Returns the part of a row that says what was asked, and the reply up to its first stop.

    Metrics of lmms-eval get the reply as the model wrote it, spaces at its ends included.

    Args:
        ask: the request.
        text: its rendered prompt.
        reply: what the model wrote.
    """
    for stop in ask.until:
        reply = reply.split(stop)[0] if stop else reply
    return {
        "id": ask.id,
        "question": ask.chat.question,
        "question_hash": fingerprint(ask, text),
        "reply": reply,
    }


def source(model: Any, name: str, wings: str | None) -> dict[str, Any]:
    """Returns what decides answers: the state of a model's weights, its learners, its surroundings.

    Args:
        model: as loaded.
        name: folder, hub name or embedded name that it was loaded by.
        wings: folder of its adapter, if it has one.
    """
    path = EMBEDDED.get(name, Path(name))
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    return {
        "model": name,
        "wings": None if wings is None else adapter_digest(wings),
        "weights": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
        or getattr(model.config, "_commit_hash", None),
        "dtype": str(model.dtype),
        "device": device_name(model.device),
        "versions": versions("lmms_eval"),
    }


class Answers:
    """Rows by id in `answers.jsonl`, written by any number of processes at once.

    Args:
        folder: made if it is not there.
        about: what decides the answers; a folder holds those of one model and method.

    Raises:
        InputError: if the folder holds answers of something else, or is damaged.
    """

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self.path, self.lock = folder / "answers.jsonl", FileLock(folder / "lock")
        folder.mkdir(parents=True, exist_ok=True)
        self.rows: dict[str, dict[str, Any]] = {}
        with self.lock:
            stored = folder / "about.json"
            wanted = json.loads(json.dumps(about))
            try:
                found = json.loads(stored.read_text()) if stored.is_file() else None
            except ValueError:
                found = None
            if found is None:
                self.path.unlink(missing_ok=True)
                stored.write_text(json.dumps(wanted, indent=2) + "\n")
            elif found != wanted:
                raise InputError(f"{folder} holds another run's answers; remove the folder")
        self.read()

    def read(self) -> None:
        """Take in what other processes wrote; a line that a kill cut off is removed."""
        if not self.path.is_file():
            return
        with self.lock:
            text = self.path.read_bytes()
            whole = text[: text.rfind(b"\n") + 1]
            if len(whole) < len(text):
                os.truncate(self.path, len(whole))
        try:
            rows = [json.loads(line) for line in whole.splitlines()]
            self.rows |= {row["id"]: row for row in rows}
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{self.path} is damaged ({error}); remove it") from error

    def append(self, rows: list[dict[str, Any]]) -> None:
        with self.lock, self.path.open("a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())
        self.rows |= {row["id"]: row for row in rows}
