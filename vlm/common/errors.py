"""The one exception that a user's input can raise."""


class InputError(ValueError):
    """Something the user gave cannot work; the message is one line that says what would.

    The command line prints it without a traceback and exits with status 2.
    """


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, or its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def one_line(text: str) -> str:
    """A text on one line of a terminal: white space is single, control characters are escaped."""
    joined = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in joined)
