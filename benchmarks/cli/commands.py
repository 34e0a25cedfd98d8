"""The commands of `vlm-prune`; nothing heavy is imported before one of them needs it."""

from importlib.metadata import version
from typing import Annotated

import typer

from vlm_prune.benchmarks.cli import (
    ask,
    bench,
    bench_against,
    bench_kernels,
    bench_peers,
    calibrate,
    compare,
    continual,
    demo,
    draw_kept_tokens,
    evaluate,
    export,
    iit,
    left_to_see,
    map,
    merge,
    methods,
    models,
    report,
    schedule,
    search,
    serve,
    tasks,
    train_tiny,
    train_wings,
)

MEASURE, USE, CHOOSE, TRAIN = "Measure", "Use", "Choose", "Train"

app = typer.Typer(
    pretty_exceptions_enable=False,
    help="Vision-token pruning for unmodified Hugging Face vision-language models.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vlm-prune {version('vlm-prune')}")
        raise typer.Exit


@app.callback()
def root_options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print and end."),
    ] = False,
) -> None:
    """Vision-token pruning for unmodified Hugging Face vision-language models."""


for name, panel, command in (
    ("eval", MEASURE, evaluate.evaluate_command),
    ("compare", MEASURE, compare.compare_command),
    ("bench", MEASURE, bench.bench_command),
    ("bench-kernels", MEASURE, bench_kernels.bench_kernels),
    ("report", MEASURE, report.report_command),
    ("ask", USE, ask.ask_command),
    ("map", USE, map.map_command),
    ("demo", USE, demo.demo),
    ("export", USE, export.export_command),
    ("methods", CHOOSE, methods.methods_command),
    ("tasks", CHOOSE, tasks.tasks),
    ("models", CHOOSE, models.models),
    ("schedule", CHOOSE, schedule.schedule_command),
    ("search", CHOOSE, search.search_command),
    ("calibrate", CHOOSE, calibrate.calibrate_command),
):
    app.command(name, rich_help_panel=panel)(command)
app.command("serve", rich_help_panel=USE, context_settings=serve.PASSED_ON)(serve.serve_command)
for name, group in (
    ("train-wings", train_wings.app),
    ("continual", continual.app),
    ("iit", iit.app),
):
    app.add_typer(group, name=name, rich_help_panel=TRAIN)
app.command("merge", rich_help_panel=TRAIN)(merge.merge_command)
app.command("bench-against", hidden=True)(bench_against.bench_against)
app.command("bench-peers", hidden=True)(bench_peers.bench_peers)
app.command("draw-kept-tokens", hidden=True)(draw_kept_tokens.draw_kept_tokens)
app.command("left-to-see", rich_help_panel=MEASURE)(left_to_see.left_to_see_command)
app.add_typer(train_tiny.app, name="train-tiny", hidden=True)
