"""The one exception that a user's input can raise."""


class InputError(ValueError):
    """Something the user gave cannot work; the message is one line that says what would.

    The command line prints it without a traceback and exits with status 2.
    """


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, or its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
