"""Answers on disk: what a killed run has, other processes give, and other runs share."""

import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import msgspec
from filelock import FileLock

from vlm_prune.benchmarks.evaluation.environment import device_name, versions
from vlm_prune.benchmarks.evaluation.records import (
    Amount,
    Count,
    PhaseTimes,
    PromptRecord,
    Record,
    Share,
    check_prompt,
)
from vlm_prune.learners.store import adapter_digest
from vlm_prune.vlm.checkpoint import weight_stamps
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.files import read_bytes
from vlm_prune.vlm.common.folder import check_settings, record_settings
from vlm_prune.vlm.common.records import from_json, to_json
from vlm_prune.vlm.load import EMBEDDED

TEXT_PHASE = "prefill and decode"


def fingerprint(ask: Any, text: str) -> str:
    """Returns a text that changes with the question, its images and video files, or how it is answered."""
    state = zlib.crc32(repr((text, sorted(ask.options.items()), ask.until, ask.forced)).encode())
    for image in ask.chat.images():
        state = zlib.crc32(image.tobytes(), zlib.crc32(repr(image.size).encode(), state))
    for video in map(Path, ask.chat.videos()):
        about = video.stat() if video.is_file() else None
        known = about and (about.st_size, about.st_mtime_ns)
        state = zlib.crc32(repr((str(video), known)).encode(), state)
    return f"{state:08x}"


class RequestFields(TypedDict):
    """The part of a `StoredAnswer` that says what was asked, and the reply."""

    id: str
    question: str
    question_hash: str
    reply: str


def answered(ask: Any, text: str, reply: str) -> RequestFields:
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


def source(model: Any, name: str, wings: str | None) -> dict[str, object]:
    """Returns what decides answers: the state of a model's weights, its learners, its surroundings.

    Args:
        model: as loaded.
        name: folder, hub name or embedded name that it was loaded by.
        wings: folder of its adapter, if it has one.
    """
    return {
        "model": name,
        "wings": None if wings is None else adapter_digest(wings),
        "weights": weight_stamps(str(EMBEDDED.get(name, name)))
        or getattr(model.config, "_commit_hash", None),
        "dtype": str(model.dtype),
        "device": device_name(model.device),
        "versions": versions("lmms_eval"),
    }


class StoredAnswer(Record, frozen=True, omit_defaults=True):
    """A row of `answers.jsonl`: what a model answered, and what its prompt cost.

    Fields of images are as in `PromptRecord`; a text-only model has none of them.

    Args:
        id: the task, the number of its document and perhaps more, `pope/000012/round1`.
        question: as it was asked.
        question_hash: its `fingerprint`.
        reply: up to the first stop.
        input_tokens: of the prompt.
        output_tokens: up to the end of the answer.
        time_ms: by phase; of a text-only model all in one.
        nll: of a text that was given, in nats; None where the model wrote one.
        greedy: whether that text is the greedy one.
    """

    id: str
    question: str
    question_hash: str
    reply: str
    images: Count
    text_tokens: Count
    input_tokens: Count
    output_tokens: Count
    time_ms: dict[str, Amount]
    image_tokens: list[Count] = msgspec.field(default_factory=list)
    cropped: bool = False
    grids: list[tuple[Count, Count] | None] = msgspec.field(default_factory=list)
    vision_flops: Amount = 0.0
    layer_tokens: list[Amount] = msgspec.field(default_factory=list)
    kept: list[list[Count]] = msgspec.field(default_factory=list)
    densities: list[Share] = msgspec.field(default_factory=list)
    chosen_density: Share | None = None
    video_grids: list[tuple[Count, Count, Count] | None] = msgspec.field(default_factory=list)
    pruned_vision_flops: Amount | None = None
    nll: float | None = None
    greedy: bool | None = None

    def __post_init__(self) -> None:
        check_prompt(self)
        _, number, *_ = (*self.id.split("/"), "")
        if not (number.isascii() and number.isdecimal()):
            raise ValueError(f"{self.id!r} is no question of a task")
        if self.time_ms.keys() not in (set(PhaseTimes.__struct_fields__), {TEXT_PHASE}):
            raise ValueError(f"time_ms is of {', '.join(self.time_ms)}")
        if TEXT_PHASE not in self.time_ms and not self.layer_tokens:
            raise ValueError("layer_tokens is empty")

    @property
    def number(self) -> int:
        """Returns which document of its task this is about."""
        return int(self.id.split("/")[1])

    @property
    def prompt(self) -> PromptRecord:
        """Returns the images of its prompt and their tokens."""
        return PromptRecord(
            **{name: getattr(self, name) for name in PromptRecord.__struct_fields__}
        )


class Answers:
    """Rows by id in `answers.jsonl`, written by any number of processes at once.

    Args:
        folder: made if it is not there.
        about: what decides the answers; a folder holds those of one model and method.

    Raises:
        InputError: if the folder holds answers of something else, or is damaged.
    """

    def __init__(self, folder: Path, about: Mapping[str, object]) -> None:
        self.path, self.lock = folder / "answers.jsonl", FileLock(folder / "lock")
        folder.mkdir(parents=True, exist_ok=True)
        self.rows: dict[str, StoredAnswer] = {}
        with self.lock:
            if not check_settings(folder / "about.json", about):
                self.path.unlink(missing_ok=True)  # whose answers they are is not known
                record_settings(folder / "about.json", about)
        self.read()

    def read(self) -> None:
        """Reads what other processes wrote; a line that a kill cut off is removed."""
        if not self.path.exists():
            return
        with self.lock:
            text = read_bytes(self.path)
            whole = text[: text.rfind(b"\n") + 1]
            if len(whole) < len(text):
                os.truncate(self.path, len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            name = f"line {number} of {self.path}"
            row = from_json(line, StoredAnswer, name, "remove it")
            if row.id.partition("/")[0] != self.path.parent.name:
                raise InputError(f"{name} answers {row.id!r}, another task's question; remove it")
            self.rows[row.id] = row

    def append(self, rows: list[StoredAnswer]) -> None:
        """Adds rows at the end of the file."""
        lines = [to_json(row, indent=None) for row in rows]
        with self.lock, self.path.open("a") as file:
            file.write("".join(lines))
            file.flush()
            os.fsync(file.fileno())
        self.rows |= {row.id: row for row in rows}
