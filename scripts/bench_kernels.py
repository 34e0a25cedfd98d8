"""Measure the kernels: `python scripts/bench_kernels.py OUT [--batch N] [--dtype bfloat16]`.

Writes OUT.json and OUT.md. A kernel is timed only if it agrees with its reference just before.
"""

import argparse
from pathlib import Path

import torch

from vlm_prune.benchmarks.evaluation.environment import environment
from vlm_prune.benchmarks.speed.kernels import Shape, cases, markdown, measure
from vlm_prune.benchmarks.speed.roofline import measured_ceilings
from vlm_prune.vlm.common.files import write_json, write_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "float16", "bfloat16"])
    parser.add_argument(
        "--not-compiled", default="", metavar="NAMES",
        help="references that torch.compile leaves alone, comma-separated; greedy_select's loop "
        "takes it minutes to unroll",
    )  # fmt: skip
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("kernels are measured on a CUDA device, and there is none")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    device, dtype = torch.device("cuda"), getattr(torch, arguments.dtype)
    ceilings = measured_ceilings(device, dtype)
    about = environment(device) | {
        "shape": str(Shape(batch=arguments.batch)),
        "dtype": arguments.dtype,
        "measured ceilings": f"{ceilings.flops:.3e} FLOP/s, {ceilings.bandwidth:.3e} B/s",
    }
    rows = []
    for case in cases(Shape(batch=arguments.batch), device, dtype):
        compiled = case.name.split()[0] not in arguments.not_compiled.split(",")
        rows.append(measure(case, ceilings, device, dtype, compiled))
        print(markdown(rows[-1:], {}).splitlines()[-1], flush=True)
    write_json(arguments.out.with_suffix(".json"), {"about": about, "rows": rows})
    write_text(arguments.out.with_suffix(".md"), markdown(rows, about))


if __name__ == "__main__":
    main()
