"""Train Wings or one of its baselines, one stage at a time, or merge a tuned model with its base.

accelerate launch scripts/train_wings.py train --data a.json --output runs/one --preset recommended-1
python scripts/train_wings.py --experiment forgetting
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from vlm_prune.benchmarks.cli.terminal import quiet, script
from vlm_prune.benchmarks.experiments.forgetting import choose_experiment
from vlm_prune.learners import WingsConfig
from vlm_prune.learners.data import read_llava
from vlm_prune.learners.merge import sweep
from vlm_prune.learners.recipe import METHODS, PRESETS
from vlm_prune.learners.train import Run, train

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.callback(invoke_without_command=True)(choose_experiment)


@app.command(name="train")
def train_command(
    data: Annotated[list[Path], typer.Option(help="LLaVA-format JSON or JSONL; may be repeated")],
    output: Annotated[Path, typer.Option(help="folder of the run; resumes what is in it")],
    images: Annotated[Path, typer.Option(help="folder of the images")] = Path("."),
    model: Annotated[str, typer.Option(help="checkpoint, or a finished run's folder")] = "tiny",
    method: Annotated[str, typer.Option(help=", ".join(METHODS))] = "wings",
    preset: Annotated[str, typer.Option(help=", ".join(PRESETS))] = "recommended-1",
    text_ratio: Annotated[float | None, typer.Option(help="share of text-only samples")] = None,
    micro_batch: Annotated[int, typer.Option(min=1, help="samples per forward and device")] = 1,
    rank: Annotated[int, typer.Option(help="of the learners")] = 64,
    layers: Annotated[list[int] | None, typer.Option(help="decoder layers with learners")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 42,
) -> None:
    """Run one stage of one method."""
    recipe = replace(PRESETS[preset], seed=seed)
    wings = WingsConfig(rank=rank, layers=tuple(layers) if layers else None)
    examples = [example for file in data for example in read_llava(file, images)]
    train(Run(model, output, method, recipe, wings, text_ratio, micro_batch), examples)


@app.command(name="merge")
def merge_command(
    base: str,
    tuned: str,
    output: Path,
    alpha: Annotated[list[float] | None, typer.Option(help="0.5 unless given; repeatable")] = None,
) -> None:
    """Write base + alpha (tuned - base), language model only, as OUTPUT/alpha-*."""
    for folder in sweep(base, tuned, output, alpha or [0.5]):
        typer.echo(folder)


if __name__ == "__main__":
    quiet()
    script(app)
