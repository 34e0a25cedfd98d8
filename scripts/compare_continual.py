"""Compare all continual learners on the packaged stream, over seeds; a killed run goes on.

python scripts/compare_continual.py runs/continual --seeds 3
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from vlm_prune.benchmarks.cli.terminal import script
from vlm_prune.benchmarks.experiments.continual.experiment import ARMS, Experiment, run_all
from vlm_prune.benchmarks.experiments.continual.results import time_steps, write
from vlm_prune.vlm.common.errors import InputError

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "continual"


def main(
    output: Annotated[Path, typer.Argument(help="folder of the runs; resumes there")],
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    steps: Annotated[int, typer.Option(min=1, help="per task")] = 20,
    test_per_class: Annotated[int, typer.Option(min=1, help="test images")] = 12,
    arms: Annotated[str, typer.Option(help="; ".join(ARMS))] = ";".join(ARMS),
    results: Annotated[Path, typer.Option(help="folder of the results")] = RESULTS,
    threads: int = 1,
    only_write: Annotated[bool, typer.Option(help="of the runs that are finished")] = False,
) -> None:
    """Search on validation images, run every method with every seed, write what came out."""
    torch.set_num_threads(threads)
    chosen = tuple(arms.split(";"))
    for name in chosen:
        if name not in ARMS:
            raise InputError(f"there is no arm {name!r}; give some of: {'; '.join(ARMS)}")
    experiment = Experiment(output, seeds, steps, test_per_class=test_per_class, arms=chosen)
    if not only_write:
        run_all(experiment, Console(stderr=True).print)
        time_steps(experiment)
    write(experiment, results)
    typer.echo(f"{results}: README.md, results.json, methods.png")


if __name__ == "__main__":
    script(lambda: typer.run(main))
