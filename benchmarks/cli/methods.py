"""`vlm-prune methods`."""

from typing import Annotated

import typer


def methods_command(
    families: Annotated[
        bool,
        typer.Option("--families", help="Print as Markdown on which model families each works."),
    ] = False,
) -> None:
    """List pruning methods."""
    from vlm_prune.benchmarks.stats.table import as_table, show
    from vlm_prune.pruning import registry
    from vlm_prune.pruning.best import packaged_definitions

    if families:
        from vlm_prune.benchmarks.cli.support import support_table

        typer.echo(support_table(), nl=False)
        return
    rows = [["method", "acts at", "positions", "what", "paper"]]
    for name, pruner in registry.methods().items():
        what = (pruner.__doc__ or "").strip().split("\n\n")[0]
        what = " ".join(what.split())
        rows.append([name, pruner.stage, pruner.authors_positions, what, pruner.paper])
    show(as_table(rows))
    for model, found in packaged_definitions().items():
        for budget, entry in found.entries.items():
            print(f"best at {budget} tokens, as found on {model}: {entry.command}")
