"""`vlm-prune merge`."""

from pathlib import Path
from typing import Annotated

import typer

from vlm_prune.vlm.common.terminal import quiet


def merge_command(
    base: Annotated[
        str,
        typer.Argument(
            help="The model before tuning, text-only or not; or a LoRA folder of the text-only one."
        ),
    ],
    tuned: Annotated[str, typer.Argument(help="The VLM: a checkpoint folder or a hub name.")],
    output: Annotated[Path, typer.Argument(help="Gets a folder alpha-* for each alpha.")],
    alpha: Annotated[
        list[float] | None,
        typer.Option(
            help="Share of the VLM's own weights that stays, 0.5 unless given (0 with a LoRA); repeatable."
        ),
    ] = None,
    first_layer: Annotated[
        int, typer.Option(help="Decoder layers before this one stay as they are in the VLM.")
    ] = 0,
) -> None:
    """Give a VLM back its language model's text skills, or a text-only LoRA, without training.

    Writes base + alpha (tuned - base), language model only, with the VLM's processor.
    """
    from vlm_prune.learners.merge import sweep
    from vlm_prune.vlm.adapter import is_adapter
    from vlm_prune.vlm.common.files import output_folder

    quiet()
    output_folder(output)
    default = 0.0 if is_adapter(base) else 0.5
    for folder in sweep(base, tuned, output, alpha or [default], first_layer):
        typer.echo(folder)
