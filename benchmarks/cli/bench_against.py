"""`vlm-prune bench-against`: this tree beside an older commit."""

from pathlib import Path
from typing import Annotated

import typer


def bench_against(
    commit: Annotated[str, typer.Argument(help="Commit of this repository to compare with.")],
    run: Annotated[
        list[str] | None,
        typer.Option(
            help="Command of vlm-prune to measure, in quotes; may be repeated. By default "
            "eval and bench of zoo at 64 tokens."
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Measured runs of each commit.")] = 3,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Measure commands at another commit and now, in turn: time, memory, phases and rows."""
    from vlm_prune.benchmarks.evaluation.environment import command_line
    from vlm_prune.benchmarks.speed.against import DEFAULT, compare_with, comparison_rows
    from vlm_prune.benchmarks.stats.table import as_table, show
    from vlm_prune.vlm.common.files import check_output, write_json

    if output is not None:
        check_output(output)
    found = compare_with(commit, run or list(DEFAULT), repeats)
    show(as_table(comparison_rows(found)))
    if output is not None:
        write_json(output, {"command": command_line()} | found)
