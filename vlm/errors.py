"""The one exception that a user's input can raise."""


class InputError(ValueError):
    """Something the user gave cannot work; the message is one line that says what would.

    The command line prints it without a traceback and exits with status 2.
    """
