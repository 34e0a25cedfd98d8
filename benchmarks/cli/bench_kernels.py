"""`vlm-prune bench-kernels`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from vlm_prune.vlm.common.errors import InputError


def bench_kernels(
    out: Annotated[Path, typer.Argument(help="OUT.json and OUT.md are written.")],
    batch: Annotated[int, typer.Option(min=1, help="Images.")] = 1,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"], typer.Option(help="Of the inputs.")
    ] = "bfloat16",
    not_compiled: Annotated[
        str,
        typer.Option(
            help="References that torch.compile leaves alone, comma-separated; greedy_select's "
            "loop takes it minutes to unroll."
        ),
    ] = "",
) -> None:
    """Time each kernel against its reference on a CUDA device, if the two agree just before."""
    import torch

    from vlm_prune.benchmarks.evaluation.environment import environment
    from vlm_prune.benchmarks.speed.kernels import Shape, cases, kernel_table, measure_case
    from vlm_prune.benchmarks.speed.roofline import measured_ceilings
    from vlm_prune.vlm.common.files import check_output, write_json, write_text

    if not out.name:
        raise InputError(f"{str(out)!r} is a folder; give the beginning of the files' names")
    files = out.with_suffix(".json"), out.with_suffix(".md")
    for file in files:
        check_output(file)
    if not torch.cuda.is_available():
        raise InputError("kernels are measured on a CUDA device, and there is none")
    device, kind = torch.device("cuda"), getattr(torch, dtype)
    ceilings = measured_ceilings(device, kind)
    shape = Shape(batch=batch)
    about = environment(device) | {
        "shape": str(shape),
        "dtype": dtype,
        "measured ceilings": f"{ceilings.flops:.3e} FLOP/s, {ceilings.bandwidth:.3e} B/s",
    }
    rows = []
    for case in cases(shape, device, kind):
        compiled = case.name.split()[0] not in not_compiled.split(",")
        rows.append(measure_case(case, ceilings, device, kind, compiled))
        print(kernel_table(rows[-1:], {}).splitlines()[-1], flush=True)
    write_json(files[0], {"about": about, "rows": rows})
    write_text(files[1], kernel_table(rows, about))
