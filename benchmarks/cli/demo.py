"""`vlm-prune demo`."""

from typing import Annotated

import typer

from vlm_prune.benchmarks.cli.options import (
    Adapter,
    Attn,
    Device,
    DeviceMap,
    Dtype,
    Model,
    Quantization,
)
from vlm_prune.vlm.common.terminal import quiet


def demo(
    model: Model = "tiny",
    host: Annotated[str, typer.Option(help="Address to serve at; others can reach 0.0.0.0.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to serve at.")] = 7860,
    device: Device = "auto",
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    quantization: Quantization = None,
    attn: Attn = None,
    adapter: Adapter = None,
) -> None:
    """Serve a page to try methods on: answers, kept tokens and times, pruned and unpruned."""
    from vlm_prune.benchmarks.report.demo import serve_demo

    quiet()
    serve_demo(
        model, host, port, device, dtype, device_map=device_map, quantization=quantization,
        attn=attn, adapter=adapter,
    )  # fmt: skip
