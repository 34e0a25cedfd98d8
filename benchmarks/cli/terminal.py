"""What a command shows on the terminal while it works."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vlm_prune.vlm.common.errors import InputError


@contextmanager
def progress(total: int, what: str = "questions") -> Iterator[Callable[[float], None]]:
    """A progress bar over questions; gives what to call with the number done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)


def quiet() -> None:
    """Leave the terminal to our own progress bar and messages."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def script(run: Callable[[], object]) -> None:
    """Run a script's command; wrong input is one line and exit code 2."""
    try:
        run()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
