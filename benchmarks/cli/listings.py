"""Commands that list what there is."""

import sys
from typing import Annotated

import typer


def methods(
    families: Annotated[
        bool,
        typer.Option("--families", help="Print as Markdown on which model families each works."),
    ] = False,
) -> None:
    """List pruning methods."""
    from rich.table import Table

    from vlm_prune.benchmarks.stats.table import show
    from vlm_prune.pruning import registry
    from vlm_prune.pruning.best import PACKAGED, definitions, described

    if families:
        from vlm_prune.benchmarks.cli.support import markdown

        typer.echo(markdown(), nl=False)
        return
    table = Table("method", "acts at", "positions", "what", "paper")
    for name, pruner in registry.methods().items():
        what = (pruner.__doc__ or "").strip().split("\n\n")[0]
        table.add_row(
            name, pruner.stage, pruner.authors_positions, " ".join(what.split()), pruner.paper
        )
    show(table)
    for budget, entry in definitions(str(PACKAGED)).entries.items():
        print(f"best at {budget} tokens: {described(*entry)}")


def tasks() -> None:
    """List evaluation tasks."""
    from importlib import import_module

    from rich.table import Table

    from vlm_prune.benchmarks.stats.table import show
    from vlm_prune.benchmarks.tasks import TASKS

    table = Table("task", "image", "what", "for example")
    for name, task in TASKS.items():
        doc = (import_module(f"vlm_prune.benchmarks.tasks.{name}").__doc__ or "").strip()
        sample = task.sample(0)
        example = f"{sample.turns[-1].text} -> {sample.answer}"
        table.add_row(name, "yes" if task.visual else "no", doc.split("\n\n")[0], example)
    show(table)


def models() -> None:
    """List model families, which methods work on each, and the embedded model."""
    from rich.table import Table

    from vlm_prune.benchmarks.cli.support import support
    from vlm_prune.benchmarks.stats.table import show
    from vlm_prune.vlm.families import FAMILIES

    matrix = support()
    table = Table("model", "what", "methods")
    table.add_row("tiny", "the embedded LLaVA; needs no download", "all")
    for name, family in FAMILIES.items():
        what = (sys.modules[family.__module__].__doc__ or "").strip().split("\n\n")[0]
        without = [method for method, works in matrix.items() if not works[name]]
        table.add_row(name, what, f"all but {', '.join(without)}" if without else "all")
    show(table)
