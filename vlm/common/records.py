"""Records: typed, validated content of JSON files."""

from pathlib import Path
from typing import Any, TypeVar

import msgspec

from vlm_prune.vlm.common.errors import InputError, first_line
from vlm_prune.vlm.common.files import plain, read_bytes

T = TypeVar("T")


def read_record(path: Path, kind: type[T], advice: str) -> T:
    """The content of a JSON file as a record of a kind.

    Args:
        path: a regular file.
        kind: a msgspec structure, a dataclass or a type of plain values. Numbers are finite, and
            a text is not taken for a number.
        advice: what helps where the file is damaged, as the end of a sentence.

    Raises:
        InputError: if the file cannot be read or holds anything else.
    """
    return decoded(read_bytes(path), kind, str(path), advice)


def read_lines(path: Path, kind: type[T], advice: str) -> list[T]:
    """Returns the records of a file with one JSON value a line; errors are as for `read_record`.

    Args:
        path: the file.
        kind: type of a record.
        advice: what to do about a damaged file, for the message.
    """
    lines = read_bytes(path).splitlines()
    return [
        decoded(line, kind, f"line {number} of {path}", advice)
        for number, line in enumerate(lines, 1)
    ]


def encoded(content: Any) -> str:
    """A record, or plain values with records among them, as indented JSON.

    Raises:
        ValueError: if what a record holds is not what its type says, or a number is not finite.
    """
    text = msgspec.json.encode(content, enc_hook=plain)
    if isinstance(content, msgspec.Struct):
        msgspec.json.decode(text, type=type(content))
    return msgspec.json.format(text, indent=2).decode()


def decoded(text: bytes | str, kind: type[T], name: str, advice: str) -> T:
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
