"""`vlm-prune bench-peers`: our methods beside the released code of others."""

from pathlib import Path
from typing import Annotated

import typer


def bench_peers(
    python: Annotated[
        Path, typer.Argument(help="Interpreter of an environment that has the releases.")
    ],
    budget: Annotated[int, typer.Option(min=1, max=576, help="Tokens to keep of an image.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Measured runs of each method.")] = 9,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Measure our methods and others' releases on random LLaVAs of one shape, in turn."""
    from vlm_prune.benchmarks.evaluation.environment import command_line
    from vlm_prune.benchmarks.speed.peers import compare_with_peers, peer_rows
    from vlm_prune.benchmarks.stats.table import as_table, show
    from vlm_prune.vlm.common.files import check_output, write_json

    if output is not None:
        check_output(output)
    found = compare_with_peers(python, budget, repeats)
    show(as_table(peer_rows(found)))
    if output is not None:
        write_json(output, {"command": command_line()} | found)
