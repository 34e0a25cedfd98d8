"""What a command shows on the terminal while it works."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import Console

WIDE = 160


class Advance(Protocol):
    """Moves a progress bar on."""

    def __call__(self, done: float, found: str = "") -> None:
        """Counts `done` further questions, and shows what has been `found` so far."""


def console(stderr: bool = False) -> "Console":
    """Returns a terminal that shows texts as they are: brackets and colons in data are no markup.

    Where there is none, lines are wide, so that no column is cut.
    """
    from rich.console import Console

    plain = Console(stderr=stderr, markup=False, emoji=False, highlight=False)
    if plain.is_terminal:
        return plain
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False, width=WIDE)


@contextmanager
def progress(total: int, what: str = "questions") -> Iterator["Advance"]:
    """Shows a progress bar over questions, on terminals; gives what to call with the number of
    further ones done, and with a word on the results so far.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    text = TextColumn("{task.description}", markup=False)
    columns = (text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    where = console()
    hidden = not where.is_terminal
    with Progress(*columns, transient=True, console=where, disable=hidden) as bar:
        task = bar.add_task(what, total=total)

        def advance(done: float, found: str = "") -> None:
            bar.update(task, advance=done, description=f"{found} {what}".strip())

        yield advance


def quiet() -> None:
    """Leaves the terminal to our own progress bar and messages."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
