"""Teach a CLIP a stream of tasks with one method, and report what it learned and forgot.

python scripts/train_continual.py                     # the packaged stream, the tiny CLIP, CoDyRA
python scripts/train_continual.py --stream x-tail --data-root DIR \
    --model ViT-B-16-quickgelu --pretrained openai    # the paper's run
accelerate launch scripts/train_continual.py ...      # several processes
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vlm_prune.benchmarks.cli.app import parse_arguments
from vlm_prune.benchmarks.cli.terminal import script
from vlm_prune.benchmarks.experiments.continual.learn import (
    Learning,
    accuracy_matrix,
    learn,
    retained,
)
from vlm_prune.continual.methods import METHODS
from vlm_prune.continual.parallel import place
from vlm_prune.continual.results import read_results
from vlm_prune.continual.streams import STREAMS
from vlm_prune.continual.streams.unseen import UNSEEN


def main(
    output: Annotated[Path | None, typer.Option(help="folder of the run; resumes there")] = None,
    stream: Annotated[str, typer.Option(help=", ".join(STREAMS))] = "packaged",
    method: Annotated[str, typer.Option(help=", ".join(METHODS))] = "codyra",
    data_root: Annotated[Path, typer.Option(help="folder of the data sets")] = Path("."),
    model: Annotated[str | None, typer.Option(help="'tiny', a name or a folder")] = None,
    pretrained: Annotated[str | None, typer.Option(help="open_clip's tag of the weights")] = None,
    options: Annotated[str, typer.Option(help="the method's, as rank=8,gate_init=ones")] = "",
    recipe: Annotated[str, typer.Option(help="the training's, as steps=100,lr=0.001")] = "",
    shots: Annotated[int | None, typer.Option(help="per class; the stream's if left out")] = None,
    test_per_class: Annotated[int | None, typer.Option(help="test images; all if left out")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="name and leave out")] = False,
    retention: Annotated[str | None, typer.Option(help=", ".join(UNSEEN))] = None,
    seed: Annotated[int, typer.Option(min=0)] = 8,
) -> None:
    """Train, or finish training, and print the accuracy matrix; the folder also has it as JSON."""
    folder = Path("runs") / f"{stream}-{method}-{seed}" if output is None else output
    given = parse_arguments(options), parse_arguments(recipe)
    settings = Learning(
        folder, stream, data_root, model, pretrained, method, *given, seed,
        test_per_class=test_per_class, shots=shots, skip_bad=skip_bad,
        retention=None if retention is None else tuple(retention.split(",")),
    )  # fmt: skip
    report = learn(settings)
    if place()[0]:
        return
    console = Console()
    console.print(accuracy_matrix(read_results(folder)).table())
    for name, left in report["retention"].items():
        console.print(retained(name, left))
    console.print(f"{folder}: report.json, matrix.png, and the final model in model/")


if __name__ == "__main__":
    script(lambda: typer.run(main))
