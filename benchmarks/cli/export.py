"""`vlm-prune export`."""

from pathlib import Path
from typing import Annotated

import typer

from vlm_prune.vlm.common.terminal import quiet


def export_command(
    model: Annotated[
        str,
        typer.Argument(
            help="'tiny', 'smol' or 'tiny-video' (embedded), a checkpoint folder, or a hub name."
        ),
    ],
    folder: Annotated[Path, typer.Argument(help="A new folder.")],
) -> None:
    """Save a checkpoint whose weight names both transformers and vLLM read."""
    from vlm_prune.vlm.serving.export import export

    quiet()
    print(f"{folder}: {export(model, folder)} weights")
