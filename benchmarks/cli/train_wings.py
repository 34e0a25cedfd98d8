"""`vlm-prune train-wings`: train Wings or a baseline, or run the experiment."""

from pathlib import Path
from typing import Annotated

import typer

from vlm_prune.benchmarks.cli.options import AllowOutside, Seed
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.registry import unknown
from vlm_prune.vlm.common.terminal import quiet

EXPERIMENTS = ("forgetting",)
METHODS = (
    "full", "attn-proj", "mlp-gate-up", "model-dowser", "lora", "frozen-llm", "replay", "wings", "wings-visual",
    "wings-textual", "wings-no-router",
)  # fmt: skip
PRESETS = (
    "paper-1", "paper-2", "scripts-1-qwen", "scripts-1-llama", "scripts-2", "scripts-2-llava",
    "recommended-1",
)  # fmt: skip

app = typer.Typer(pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def choose_experiment(
    context: typer.Context,
    experiment: Annotated[str | None, typer.Option(help=", ".join(EXPERIMENTS))] = None,
    base: Annotated[
        Path | None, typer.Option(help="Safetensors of a text-only language model.")
    ] = None,
    output: Annotated[
        Path, typer.Option(help="Folder for the experiment's files; it resumes there.")
    ] = Path("runs/forgetting"),
    results: Annotated[Path, typer.Option(help="Folder for JSON, table and plot.")] = Path(
        "docs/results/forgetting"
    ),
    jobs: Annotated[int, typer.Option(min=1, help="Processes; each does one arm at a time.")] = 1,
    arms: Annotated[
        str | None,
        typer.Option(
            help="Of the experiment, comma-separated, such as full,model-dowser; all else."
        ),
    ] = None,
    model: Annotated[
        str, typer.Option(help="Whose language model learns to see: tiny, or smol for SmolLM2.")
    ] = "tiny",
    quick: Annotated[bool, typer.Option(help="A few steps, to see that it runs.")] = False,
) -> None:
    """Train Wings learners, or run an experiment."""
    if context.invoked_subcommand is not None:
        return
    if experiment is None:
        raise InputError(f"give a command, or --experiment {EXPERIMENTS[0]}")
    if experiment not in EXPERIMENTS:
        raise InputError(unknown("experiment", experiment, EXPERIMENTS))
    from vlm_prune.benchmarks.experiments.forgetting import arms as experiment_arms
    from vlm_prune.benchmarks.experiments.forgetting.experiment import run

    quiet()
    names = None if arms is None else [name.strip() for name in arms.split(",")]
    plan = experiment_arms.PLANS[model]
    run(experiment_arms.quick(plan) if quick else plan, output, results, base, jobs, names)


@app.command("train")
def train_wings_command(
    data: Annotated[
        list[Path], typer.Option(help="LLaVA-format JSON, JSONL or Parquet; may be repeated.")
    ],
    output: Annotated[Path, typer.Option(help="Folder of the run; resumes what is in it.")],
    images: Annotated[Path, typer.Option(help="Folder of the images.")] = Path("."),
    allow_outside: AllowOutside = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out samples of no use, and say how many.")
    ] = False,
    model: Annotated[str, typer.Option(help="Checkpoint, or a finished run's folder.")] = "tiny",
    method: Annotated[str, typer.Option(help=", ".join(METHODS))] = "wings",
    preset: Annotated[str, typer.Option(help=", ".join(PRESETS))] = "recommended-1",
    text_ratio: Annotated[float | None, typer.Option(help="Share of text-only samples.")] = None,
    micro_batch: Annotated[int, typer.Option(min=1, help="Samples per forward and device.")] = 1,
    rank: Annotated[int, typer.Option(help="Of the learners.")] = 64,
    layers: Annotated[list[int] | None, typer.Option(help="Decoder layers with learners.")] = None,
    stride: Annotated[
        int, typer.Option(min=1, help="Learners in every so many decoder layers.")
    ] = 1,
    seed: Seed = 42,
) -> None:
    """Run one stage of one method; start it with `accelerate launch` for several processes."""
    from dataclasses import replace

    from vlm_prune.learners import WingsConfig
    from vlm_prune.learners import train as training
    from vlm_prune.learners.data import read_llava
    from vlm_prune.learners.recipe import PRESETS as presets
    from vlm_prune.vlm.common.paths import DataRoot

    quiet()
    recipe = replace(presets[preset], seed=seed)
    wings = WingsConfig(rank=rank, layers=tuple(layers) if layers else None, stride=stride)
    root, left_out = DataRoot(images, allow_outside), list[str]()
    bad = left_out if skip_bad else None
    examples = [example for file in data for example in read_llava(file, root, bad)]
    if left_out:
        typer.echo(f"{len(left_out)} sample(s) left out; the first: {left_out[0]}", err=True)
    run = training.WingsRun(
        model, output, method, recipe, wings, text_ratio, micro_batch, skip_bad=skip_bad
    )
    training.train_wings(run, examples)
