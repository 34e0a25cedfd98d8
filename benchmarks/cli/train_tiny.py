"""`vlm-prune train-tiny`: make the embedded models again."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from vlm_prune.benchmarks.cli.options import Seed

STAGES = ("tower", "reading", "symbols", "stories", "projector", "language", "practice")
Folder = Annotated[Path, typer.Argument(help="Where a killed training goes on.")]
Threads = Annotated[int, typer.Option(min=1, help="Of torch.")]
Bf16 = Annotated[bool, typer.Option(help="Fast if the CPU has bf16 instructions.")]
Install = Annotated[bool, typer.Option("--install", help="Put the result into the package.")]
Keep = Literal["tower", "all"]

app = typer.Typer(pretty_exceptions_enable=False, help="Train the embedded models on a CPU.")


def _begin(folder: Path, threads: int) -> None:
    from vlm_prune.vlm.common.files import output_folder

    output_folder(folder)
    import logging

    import torch

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(threads)


@app.command()
def llava(
    folder: Folder,
    stage: Annotated[list[str] | None, typer.Option(help=", ".join(STAGES))] = None,
    seed: Seed = 0,
    threads: Threads = 2,
    keep: Annotated[Keep | None, typer.Option(help="Start from the packaged weights.")] = None,
    bf16: Bf16 = False,
    install: Install = False,
) -> None:
    """Train the LLaVA on the embedded tasks' training scenes, in about two and a half hours.

    The result is written to `FOLDER/checkpoint`. Stages that the folder already holds are loaded,
    not repeated.
    """
    _begin(folder, threads)
    from vlm_prune.benchmarks.embedded_models.packaged import train_llava

    train_llava(folder, tuple(stage or ()), seed, keep, bf16, install)


@app.command()
def text(
    folder: Folder,
    steps: Annotated[int, typer.Option(min=1)] = 1200,
    seed: Seed = 0,
    threads: Threads = 2,
    bf16: Bf16 = False,
    install: Install = False,
) -> None:
    """Train a language model of the LLaVA's shape on text alone, in about half an hour.

    The result is `FOLDER/text.safetensors`, the base of the experiment `forgetting`. Tokenizer and
    shape are those of the packaged model; its weights are not used.
    """
    _begin(folder, threads)
    from vlm_prune.benchmarks.embedded_models.packaged import train_base

    train_base(folder, steps, seed, bf16, install)


@app.command("clip")
def train_clip_command(
    folder: Folder, seed: Seed = 0, threads: Threads = 2, install: Install = False
) -> None:
    """Pre-train the CLIP; a training that was killed goes on from its last checkpoint."""
    _begin(folder, threads)
    from vlm_prune.benchmarks.embedded_models.packaged import train_clip

    train_clip(folder, seed, install)


@app.command()
def smol(
    folder: Folder,
    steps: Annotated[
        int, typer.Option(min=1, help="In all; a resumed run may be given more.")
    ] = 1400,
    minutes: Annotated[
        float | None, typer.Option(min=1, help="End after this time instead of a number of steps.")
    ] = None,
    seed: Seed = 0,
    threads: Threads = 2,
    keep: Annotated[bool, typer.Option("--keep", help="Start from the packaged weights.")] = False,
    practice: Annotated[
        bool,
        typer.Option("--practice", help="With --keep: its last level alone, at lower rates."),
    ] = False,
    install: Install = False,
) -> None:
    """Train projector and LoRA of the LLaVA over SmolLM2, in about an hour on a CPU with AMX.

    Other CPUs compute in fp32 and take several times as long. A training that was killed goes on
    from its last state, a few minutes back.
    """
    _begin(folder, threads)
    from vlm_prune.benchmarks.embedded_models.packaged import train_smol

    train_smol(folder, steps, minutes, seed, keep, practice, install)


@app.command("average-smol")
def average_smol_command(
    folder: Annotated[Path, typer.Argument(help="Where the mean goes.")],
    trainings: Annotated[list[Path], typer.Argument(help="Folders of finished trainings.")],
    install: Install = False,
) -> None:
    """Average the weights of several trainings of the LLaVA over SmolLM2.

    Trainings that started from the same weights answer better by their mean than each alone.
    """
    from vlm_prune.benchmarks.embedded_models.packaged import average_smol

    average_smol(folder, trainings, install)


@app.command()
def video(
    folder: Folder,
    minutes: Annotated[
        float, typer.Option(min=0.01, help="Of training; curriculum and rate follow them.")
    ] = 80,
    seed: Seed = 0,
    threads: Threads = 1,
    keep: Annotated[bool, typer.Option("--keep", help="Start from the packaged weights.")] = False,
    install: Install = False,
) -> None:
    """Train the LLaVA-OneVision for videos from the weights of the LLaVA, in an hour and a half.

    A training that was killed goes on from its last state, a few minutes back.
    """
    _begin(folder, threads)
    from vlm_prune.benchmarks.embedded_models.packaged import train_video

    train_video(folder, minutes, seed, keep, install)


@app.command("measure-smol")
def measure_smol(
    output: Annotated[Path, typer.Argument(help="JSON file for the figures.")],
    threads: Threads = 2,
) -> None:
    """Measure whether the LLaVA over SmolLM2 kept SmolLM2's text skills: loss and answers."""
    import torch

    torch.set_num_threads(threads)
    from vlm_prune.benchmarks.embedded_models.text_skills import measure

    measure(output)
