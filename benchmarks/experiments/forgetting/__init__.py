"""How much text skill a language model loses by learning to see, and what keeps it.

Wings (https://arxiv.org/abs/2406.03496) is compared with full tuning at two rates, LoRA, replay, a
frozen language model and merging, on one base model, data set and vision tower, over several seeds.
"""

from pathlib import Path
from typing import Annotated

import typer

EXPERIMENTS = ("forgetting",)


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
        "benchmarks/results/forgetting"
    ),
    jobs: Annotated[int, typer.Option(min=1, help="Processes; each does one arm at a time.")] = 1,
    quick: Annotated[bool, typer.Option(help="A few steps, to see that it runs.")] = False,
) -> None:
    """Learners: train them, merge models, or run an experiment."""
    if context.invoked_subcommand is not None:
        return
    from vlm_prune.benchmarks.cli.terminal import quiet
    from vlm_prune.benchmarks.experiments.forgetting.arms import QUICK, Plan
    from vlm_prune.benchmarks.experiments.forgetting.experiment import run
    from vlm_prune.vlm.common.errors import InputError
    from vlm_prune.vlm.common.registry import unknown

    if experiment is None:
        raise InputError(f"give a command, or --experiment {EXPERIMENTS[0]}")
    if experiment not in EXPERIMENTS:
        raise InputError(unknown("experiment", experiment, EXPERIMENTS))
    quiet()
    run(QUICK if quick else Plan(), output, results, base, jobs)
