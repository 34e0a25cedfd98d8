"""`vlm-prune ask`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from vlm_prune.benchmarks.cli.options import (
    Adapter,
    Attn,
    Device,
    DeviceMap,
    Dtype,
    Method,
    Model,
    OneBudget,
    Quantization,
)
from vlm_prune.vlm.budget import parse_budget
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.terminal import progress, quiet


def ask_command(
    image: Annotated[Path, typer.Argument(help="An image or video file.")],
    question: Annotated[str, typer.Argument(help="A question about it.")],
    model: Model = "tiny",
    method: Method = "zoo",
    budget: OneBudget = "64",
    device: Device = "auto",
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    quantization: Quantization = None,
    attn: Attn = None,
    adapter: Adapter = None,
    frames: Annotated[int, typer.Option(help="Frames of a video, at most.")] = 32,
    fps: Annotated[float | None, typer.Option(help="Frames for each second instead.")] = None,
    sheet: Annotated[
        Path | None, typer.Option(help="PNG file for a video's frames and their kept tokens.")
    ] = None,
) -> None:
    """Answer one question about one image or video with a pruned model."""
    from vlm_prune.benchmarks.report.overlay import contact_sheet
    from vlm_prune.pruning.pipeline import PrunedVLM
    from vlm_prune.pruning.registry import build
    from vlm_prune.vlm.common.files import atomic_path, check_output
    from vlm_prune.vlm.common.images import open_image
    from vlm_prune.vlm.common.video import is_video, open_video
    from vlm_prune.vlm.load import load

    quiet()
    if not question.strip():
        raise InputError("the question is empty; give one about the image")
    if sheet is not None:
        if not is_video(image):
            raise InputError("--sheet draws the frames of a video; give a video file")
        check_output(sheet)
    picture: Any
    if is_video(image):
        with progress(frames, "frames") as advance:
            picture = open_video(image, frames, fps, advance)
    else:
        picture = open_image(image)
    pruner = build(method, budget=parse_budget(budget))
    loaded = load(
        model, device, dtype, device_map=device_map, quantization=quantization, attn=attn,
        adapter=adapter,
    )  # fmt: skip
    vlm = PrunedVLM(*loaded, pruner)
    (reply,) = vlm.replies([picture], [question])
    print(reply.text)
    if sheet is not None and reply.kept is not None and reply.grid is not None:
        with atomic_path(sheet) as partial:
            contact_sheet(picture, reply.kept, reply.grid).save(partial, "PNG")
