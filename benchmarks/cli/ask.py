"""`vlm-prune ask`."""

from functools import partial
from pathlib import Path
from typing import Annotated

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
    from vlm_prune.vlm.common.video import VideoClip, open_visual
    from vlm_prune.vlm.load import load

    quiet()
    if not question.strip():
        raise InputError("the question is empty; give one about the image")
    if sheet is not None:
        check_output(sheet)
    picture = open_visual(image, frames, fps, partial(progress, what="frames"))
    if sheet is not None and not isinstance(picture, VideoClip):
        raise InputError("--sheet draws the frames of a video; give a video file")
    pruner = build(method, budget=parse_budget(budget))
    loaded = load(
        model, device, dtype, device_map=device_map, quantization=quantization, attn=attn,
        adapter=adapter,
    )  # fmt: skip
    vlm = PrunedVLM(*loaded, pruner)
    (reply,) = vlm.replies([picture], [question])
    print(reply.text)
    clip = picture if isinstance(picture, VideoClip) else None
    if sheet is not None and clip and reply.kept is not None and reply.grid is not None:
        with atomic_path(sheet) as file:
            contact_sheet(clip, reply.kept, reply.grid).save(file, "PNG")
