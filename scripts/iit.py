"""Build the IIT reconstruction from public benchmarks, or evaluate a model on it.

python scripts/iit.py build IIT --source mmlu=copies/mmlu --source mmmu=lmms-lab/MMMU
python scripts/iit.py evaluate IIT --model llava-hf/llava-1.5-7b-hf --context own
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from vlm_prune.benchmarks.cli.terminal import script
from vlm_prune.benchmarks.experiments.iit.build import build
from vlm_prune.benchmarks.experiments.iit.evaluate import evaluate
from vlm_prune.benchmarks.experiments.iit.sources import SOURCES
from vlm_prune.learners import from_pretrained
from vlm_prune.pruning.registry import build as build_pruner
from vlm_prune.vlm.load import load

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(name="build")
def build_command(
    folder: Path,
    source: Annotated[list[str], typer.Option(help=f"NAME or NAME=PATH; {', '.join(SOURCES)}")],
    size: Annotated[int, typer.Option(min=1, help="conversations per setting")] = 500,
    seed: int = 0,
) -> None:
    """Write conversations in six settings; sources without a path come from the hub."""
    named = [part.partition("=") for part in source]
    counts = build(folder, {name: where or None for name, _, where in named}, size, seed)
    typer.echo(f"{folder}: " + ", ".join(f"({s}) {n}" for s, n in counts.items()))


@app.command(name="evaluate")
def evaluate_command(
    folder: Path,
    output: Path = Path("runs/iit"),
    model: str = "tiny",
    wings: str | None = None,
    method: str = "none",
    budget: float = 1.0,
    context: Annotated[str, typer.Option(help="own or gold earlier replies")] = "own",
    limit: int | None = None,
    device: str = "cpu",
) -> None:
    """Score the last turn of each conversation."""
    loaded, processor = load(model, device)
    if wings is not None:
        from_pretrained(loaded, wings)
    pruner: Any = None if method == "none" else build_pruner(method, budget=budget)
    results = evaluate(loaded, processor, folder, output, context, pruner, limit)  # type: ignore[arg-type]
    for setting, entry in results["settings"].items():
        low, high = entry["ci"]
        typer.echo(f"({setting}) {entry['accuracy']:.3f} [{low:.3f}, {high:.3f}], n {entry['n']}")


if __name__ == "__main__":
    script(app)
