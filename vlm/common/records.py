"""Records: typed, validated content of JSON files."""

import json
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from vlm_prune.vlm.common.errors import InputError, first_line
from vlm_prune.vlm.common.files import plain, read_bytes

T = TypeVar("T")


def read_record(path: Path, kind: type[T], advice: str) -> T:
    """Reads a JSON file as a record of a kind.

    Args:
        path: a regular file.
        kind: a msgspec structure, a dataclass or a type of plain values. Numbers are finite, and
            a text is not taken for a number.
        advice: what helps where the file is damaged, as the end of a sentence.

    Raises:
        InputError: if the file cannot be read or holds anything else.
    """
    return from_json(read_bytes(path), kind, str(path), advice)


def to_json(content: Any, indent: int | None = 2) -> str:
    """Returns a record, or plain values with records among them, as JSON;
    without `indent` on one line.

    Raises:
        ValueError: if what a record holds is not what its type says, or a number is not finite.
    """
    values = msgspec.to_builtins(content, str_keys=True, enc_hook=plain)
    text = json.dumps(values, indent=indent, allow_nan=False)
    if isinstance(content, msgspec.Struct):
        msgspec.json.decode(text, type=type(content))
    return text + "\n"


def from_json(text: bytes | str, kind: type[T], name: str, advice: str) -> T:
    """Returns JSON as a record; errors are as for `read_record`.

    Args:
        text: the JSON.
        kind: type of the record.
        name: what holds it, for the message.
        advice: what to do about it, for the message.
    """
    try:
        return msgspec.json.decode(text, type=kind)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} is damaged ({first_line(error)}); {advice}") from error
