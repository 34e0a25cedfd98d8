"""`vlm-prune ask`."""

from pathlib import Path
from typing import Annotated

import typer

from vlm_prune.benchmarks.cli.options import Device, Dtype, Method, Model, OneBudget, parse_budget
from vlm_prune.benchmarks.cli.terminal import quiet


def ask(
    image: Annotated[Path, typer.Argument(help="An image file.")],
    question: Annotated[str, typer.Argument(help="A question about it.")],
    model: Model = "tiny",
    method: Method = "zoo",
    budget: OneBudget = "64",
    device: Device = "cpu",
    dtype: Dtype = "auto",
) -> None:
    """Answer one question about one image with a pruned model."""
    from vlm_prune.pruning.pipeline import PrunedVLM
    from vlm_prune.vlm.common.images import open_image

    quiet()
    picture = open_image(image)
    vlm = PrunedVLM.from_pretrained(model, method, parse_budget(budget), device, dtype)
    print(vlm.answer(picture, question))
