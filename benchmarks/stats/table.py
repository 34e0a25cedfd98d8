"""Tables: rows of text under a header, for a terminal and in Markdown."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vlm_prune.vlm.common.errors import one_line
from vlm_prune.vlm.common.terminal import console

if TYPE_CHECKING:
    from rich.table import Table

Rows = Sequence[Sequence[object]]


def as_table(rows: Rows, title: str | None = None, sections: Sequence[int] = ()) -> "Table":
    """Returns a header and rows as a table for a terminal.

    Args:
        rows: the header first.
        title: above the table.
        sections: numbers of rows, the first below the header being 1, that have a line above them.
    """
    from rich.table import Table

    header, *body = rows
    table = Table(*map(str, header), title=title)
    for number, row in enumerate(body, 1):
        if number in sections:
            table.add_section()
        table.add_row(*map(str, row))
    return table


def as_markdown(rows: Rows) -> str:
    """Returns a header and rows, in Markdown; what is a mark there is escaped."""
    header, *body = rows
    lines = [header, ["---"] * len(header), *body]
    return "".join(f"| {' | '.join(map(_cell, line))} |\n" for line in lines)


def _cell(value: object) -> str:
    return one_line(str(value)).replace("|", "\\|")


def show(item: Any) -> None:
    """Prints without cutting columns, also where there is no terminal; brackets are no markup."""
    console().print(item)


def percent(value: float) -> str:
    """Returns a share as per cent with one digit."""
    return f"{100 * value:.1f}"


def percent_interval(value: float, interval: Sequence[float]) -> str:
    """Returns a share as per cent with its interval, `61.0 [59.2, 62.9]`."""
    return f"{percent(value)} [{percent(interval[0])}, {percent(interval[1])}]"


def points(value: float, interval: Sequence[float]) -> str:
    """Formats a difference of accuracies in points, with its interval."""
    return f"{100 * value:+.1f} [{100 * interval[0]:+.1f}, {100 * interval[1]:+.1f}]"
