"""The one exception that a user's input can raise."""

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Something the user gave cannot work; the message is one line that says what would.

    The command line prints it without a traceback and exits with status 2.
    """


def first_line(error: BaseException) -> str:
    """Returns the first line of what an exception says, or its type where it says nothing."""
    return _lines(error)[0]


def _lines(error: BaseException) -> list[str]:
    if isinstance(error, OSError) and error.strerror:
        named = f": {error.filename}" if error.filename else ""
        return [f"{error.strerror}{named}"]
    return str(error).strip().splitlines() or [type(error).__name__]


def one_line(text: str) -> str:
    """Returns a text on one line of a terminal: white space is single,
    control characters are escaped.
    """
    joined = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in joined)


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Turns whatever is raised in the block into an `InputError` of one
    line that begins with `what`.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, RecursionError):
            raise InputError(f"{what}: it is nested too deeply") from error
        # "Error(s) in loading state_dict for CLIP:" says what is wrong in its next line
        first, *rest = _lines(error)
        line = f"{first} {rest[0].strip()}" if rest and first.endswith(":") else first
        if type(error).__name__ == "SafetensorError":
            line = f"its weights are damaged ({line})"
        raise InputError(f"{what}: {line}") from error
