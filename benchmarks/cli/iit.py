"""`vlm-prune iit`: build the IIT reconstruction from public benchmarks, or evaluate a model on it."""

from pathlib import Path
from typing import Annotated, Any

import typer

from vlm_prune.benchmarks.cli.options import (
    AllowOutside,
    Device,
    Model,
    Seed,
    Wings,
)
from vlm_prune.vlm.budget import parse_budget
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.terminal import quiet

SOURCES = ("mmlu", "cmmlu", "openbookqa", "hellaswag", "mmmu", "mmbench", "seed", "ai2d")

app = typer.Typer(
    pretty_exceptions_enable=False, help="Interleaved conversations: build or evaluate."
)


@app.command("build")
def build_iit(
    folder: Annotated[Path, typer.Argument(help="Where the conversations go.")],
    source: Annotated[list[str], typer.Option(help=f"NAME or NAME=PATH; {', '.join(SOURCES)}")],
    size: Annotated[int, typer.Option(min=1, help="Conversations per setting.")] = 500,
    allow_outside: AllowOutside = False,
    seed: Seed = 0,
) -> None:
    """Write conversations in six settings; sources without a path come from the hub."""
    from vlm_prune.benchmarks.experiments.iit.build import build_conversations
    from vlm_prune.vlm.common.files import check_outputs

    check_outputs(folder, ("iit.jsonl", "manifest.json"))
    named = [part.partition("=") for part in source]
    sources = {name: where or None for name, _, where in named}
    counts = build_conversations(folder, sources, size, seed, allow_outside)
    typer.echo(f"{folder}: " + ", ".join(f"({s}) {n}" for s, n in counts.items()))


@app.command("evaluate")
def evaluate_iit(
    folder: Annotated[Path, typer.Argument(help="What `build` wrote.")],
    output: Annotated[Path, typer.Option(help="Folder for results.")] = Path("runs/iit"),
    model: Model = "tiny",
    wings: Wings = None,
    method: Annotated[str, typer.Option(help="See 'vlm-prune methods'.")] = "none",
    budget: Annotated[
        str | None, typer.Option(help="Tokens per image, or a fraction, of the method.")
    ] = None,
    context: Annotated[str, typer.Option(help="own or gold earlier replies.")] = "own",
    limit: Annotated[int | None, typer.Option(min=1, help="Conversations of a setting.")] = None,
    allow_outside: AllowOutside = False,
    device: Device = "auto",
) -> None:
    """Score the last turn of each conversation."""
    from vlm_prune.benchmarks.experiments.iit.evaluate import (
        check_conversations,
        evaluate_conversations,
    )
    from vlm_prune.learners import from_pretrained
    from vlm_prune.pruning.registry import build as build_pruner
    from vlm_prune.vlm.common.paths import DataRoot
    from vlm_prune.vlm.load import load

    quiet()
    pruner: Any = None
    kept = 1.0 if budget is None else parse_budget(budget)
    if method != "none":
        pruner = build_pruner(method, budget=kept)
    elif budget is not None:
        raise InputError(f"--budget {budget} is of a pruning method; give --method, too")
    root = DataRoot(folder, allow_outside)
    check_conversations(root, output, context)
    loaded, processor = load(model, device)
    if wings is not None:
        from_pretrained(loaded, wings)
    if pruner is not None:
        pruner.admit(loaded)
    results = evaluate_conversations(loaded, processor, root, output, context, pruner, limit)  # type: ignore[arg-type]
    for setting, entry in results["settings"].items():
        low, high = entry["ci"]
        typer.echo(f"({setting}) {entry['accuracy']:.3f} [{low:.3f}, {high:.3f}], n {entry['n']}")
