"""`vlm-prune map`."""

from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from vlm_prune.benchmarks.cli.options import (
    Adapter,
    AllowOutside,
    Attn,
    BatchSize,
    DeviceMap,
    Dtype,
    Method,
    MethodArgs,
    Model,
    OneBudget,
    Positions,
    Quantization,
    check_engine,
    parse_method_args,
)
from vlm_prune.vlm.budget import parse_budget
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.terminal import progress, quiet
from vlm_prune.vlm.common.video import check_rate


def map_command(
    source: Annotated[
        Path,
        typer.Option(
            "--input",
            help="A folder of images and videos, or a .csv or .parquet file: path[, prompt].",
        ),
    ],
    output: Annotated[
        Path, typer.Option(help="Parquet file to write; a killed run resumes beside it.")
    ],
    prompt: Annotated[str, typer.Option(help="Asked about every image without its own.")] = "",
    model: Model = "tiny",
    method: Method = "zoo",
    budget: OneBudget = "64",
    batch_size: BatchSize = 8,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda (Ray hands out the GPUs), mps.")
    ] = "auto",
    dtype: Dtype = "auto",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first images.")] = None,
    allow_outside: AllowOutside = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer; the model's own limit unless given.")
    ] = None,
    positions: Positions = "auto",
    method_args: MethodArgs = "",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Models at a time; one per GPU, or one on the CPUs.")
    ] = None,
    cpus: Annotated[int | None, typer.Option(min=2, help="CPUs to use; all unless given.")] = None,
    engine: Annotated[str, typer.Option(help="What answers: hf, or vllm.")] = "hf",
    device_map: DeviceMap = None,
    quantization: Quantization = None,
    attn: Attn = None,
    adapter: Adapter = None,
    frames: Annotated[int, typer.Option(min=1, help="Frames of a video, at most.")] = 32,
    fps: Annotated[float | None, typer.Option(help="Frames for each second instead.")] = None,
) -> None:
    """Answer one prompt about every image or video of a folder, with Ray Data; it resumes."""
    if find_spec("ray") is None or find_spec("pyarrow") is None:
        raise InputError("map needs Ray Data; install it with: pip install 'vlm-prune[ray]'")
    from vlm_prune.benchmarks.batch import pipeline
    from vlm_prune.benchmarks.batch.config import MapConfig
    from vlm_prune.benchmarks.evaluation.records import Variant

    quiet()
    check_engine(engine)
    check_rate(frames, fps)
    if engine != "hf" and any((device_map, quantization, attn, adapter)):
        raise InputError(
            "--device-map, --quantization, --attn and --adapter are for --engine hf; vLLM has "
            "options of its own"
        )
    variant = Variant(method, parse_budget(budget), positions, parse_method_args(method_args))
    config = MapConfig(
        str(source.absolute()),
        prompt,
        model,
        variant,
        device,
        dtype,
        limit,
        max_new_tokens,
        allow_outside,
        engine,
        device_map,
        quantization,
        attn,
        adapter,
        frames,
        fps,
    )
    bar = partial(progress, what="images")
    rows, errors = pipeline.map_images(config, output, batch_size, workers, cpus, bar)
    print(f"{output}: {rows} rows, {errors} with an error instead of an answer")
