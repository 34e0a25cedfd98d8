"""`vlm-prune bench`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from vlm_prune.benchmarks.cli.options import (
    Compile,
    Device,
    MethodArgs,
    OneBudget,
    Positions,
    ScheduleFile,
    as_flags,
    check_engine,
    given_options,
    parse_method_args,
    with_schedule,
)
from vlm_prune.vlm.budget import parse_budget
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.terminal import quiet

GOES_WITH = {
    "--attention": ("attention_tokens", "density"),
    "--wings": ("wings_stride",),
    "--engine vllm": ("requests", "concurrency"),
}
"""Options that go with another one alone."""

UNUSED = {
    "--attention": (
        "batch", "budget", "compile", "engine", "method", "new_tokens", "positions", "schedule",
        "tower_layers", "video_frames", "wings",
    ),
    "--wings": (
        "budget", "compile", "engine", "method", "method_args", "positions", "schedule", "video_frames",
    ),
    "--engine vllm": ("batch", "compile", "device", "schedule", "tower_layers", "video_frames"),
}  # fmt: skip
"""Options that another one does not read; of two that exclude each other the first names the second."""


def bench_command(
    context: typer.Context,
    model_shape: Annotated[
        str, typer.Option(help="Architecture: tiny, llava-1.5-7b, qwen2.5-vl-3b or another's.")
    ] = "tiny",
    method: Annotated[
        str, typer.Option(help="See 'vlm-prune methods'; several comma-separated, or all.")
    ] = "zoo",
    budget: OneBudget = "64",
    batch: Annotated[int, typer.Option(min=1, help="Prompts per call, one image each.")] = 1,
    repeats: Annotated[
        int | None,
        typer.Option(min=1, help="Measured calls of each model: 10, or 2 with --engine vllm."),
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens answered per prompt.")] = 16,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16.")] = "float32",
    layers: Annotated[
        int | None, typer.Option(help="Decoder layers, where all are too many for the machine.")
    ] = None,
    video_frames: Annotated[
        int, typer.Option(min=0, help="Frames of a video per prompt, instead of an image.")
    ] = 0,
    tower_layers: Annotated[
        int | None, typer.Option(help="Layers of the vision tower, likewise.")
    ] = None,
    compile: Compile = False,
    positions: Positions = "auto",
    method_args: MethodArgs = "",
    schedule: ScheduleFile = None,
    wings: Annotated[
        int | None, typer.Option(min=1, help="Time Wings' learners of this rank, not a method.")
    ] = None,
    wings_stride: Annotated[
        int, typer.Option(min=1, help="With --wings: learners in every so many layers.")
    ] = 1,
    engine: Annotated[
        str, typer.Option(help="hf, or vllm: requests per second and time to the first token.")
    ] = "hf",
    requests: Annotated[
        int, typer.Option(min=1, help="Requests at each concurrency, with --engine vllm.")
    ] = 32,
    concurrency: Annotated[
        str, typer.Option(help="Requests under way at a time, comma-separated, likewise.")
    ] = "1,4,16",
    attention: Annotated[
        str | None,
        typer.Option(help="Time methods of sparse attention, comma-separated, not a pruner."),
    ] = None,
    attention_tokens: Annotated[
        str, typer.Option(help="Lengths of the prompts, comma-separated, with --attention.")
    ] = "4096,8192,16384,32768",
    density: Annotated[
        float, typer.Option(help="Share of the causal half that is computed, likewise.")
    ] = 0.2,
    output: Annotated[Path | None, typer.Option(help="Folder for bench.json, bench.md.")] = None,
) -> None:
    """Time a pruned and the unpruned architecture on random weights, phase by phase."""
    from vlm_prune.benchmarks.cli.support import named_methods
    from vlm_prune.benchmarks.evaluation.records import Variant
    from vlm_prune.benchmarks.speed.attention import (
        SparseBenchConfig,
        about_attention,
        attention_rows,
        bench_attention,
    )
    from vlm_prune.benchmarks.speed.bench import BenchConfig
    from vlm_prune.benchmarks.speed.bench import bench as measure
    from vlm_prune.benchmarks.speed.bench_table import (
        about_setting,
        bench_overview,
        bench_rows,
        bench_summary,
    )
    from vlm_prune.benchmarks.speed.serving import (
        ServingConfig,
        bench_serving,
        serving_rows,
        serving_summary,
    )
    from vlm_prune.benchmarks.speed.shapes import SHAPES
    from vlm_prune.benchmarks.speed.wings_cost import about_wings, bench_wings, wings_rows
    from vlm_prune.benchmarks.stats.table import as_markdown, as_table, show
    from vlm_prune.vlm.common.files import check_outputs, write_text
    from vlm_prune.vlm.common.records import to_json

    quiet()
    check_engine(engine)
    if output is not None:
        check_outputs(output, ("bench.json", "bench.md"))
    given = given_options(context) - ({"engine"} if engine == "hf" else set())
    chosen = {"--attention": attention, "--wings": wings, "--engine vllm": engine == "vllm"}
    for other, is_chosen in chosen.items():
        if not is_chosen and (lone := as_flags(given & {*GOES_WITH[other]})):
            options = " and ".join(lone)
            raise InputError(f"{options} without {other} would change nothing; add it")
        if is_chosen and (unused := as_flags(given & {*UNUSED[other]})):
            options = " and ".join(unused)
            raise InputError(f"{other} would ignore {options}; leave out {options}")
    if not 0 < density <= 1:
        raise InputError(f"density {density} is no share; give one above 0, at most 1")
    counts = _counts(concurrency, "concurrency", "1,4,16")
    lengths = _counts(attention_tokens, "attention-tokens", "4096,16384")
    names = named_methods(method, lambda: SHAPES[model_shape](), layers)
    if engine == "vllm" and len(names) > 1:
        raise InputError("--engine vllm measures one method; name one in --method")
    more = parse_method_args(method_args)
    variants = [Variant(name, parse_budget(budget), positions, more) for name in names]
    variants = with_schedule(variants, schedule)
    config = BenchConfig(
        model_shape, variants[0], batch=batch, repeats=repeats or 10, new_tokens=new_tokens,
        device=device, dtype=dtype, layers=layers, video_frames=video_frames,
        tower_layers=tower_layers, compile=compile,
    )  # fmt: skip
    results: Any
    if attention is not None:
        results = bench_attention(
            SparseBenchConfig(
                model_shape, tuple(attention.split(",")), lengths, density, more, layers,
                repeats or 10, device, dtype,
            )
        )  # fmt: skip
        lines, table = about_attention(results), attention_rows(results)
    elif engine == "vllm":
        if isinstance(served := variants[0].budget, str):
            raise InputError(
                f"--engine vllm measures images; give a number of tokens, not {served}"
            )
        results = bench_serving(
            ServingConfig(
                model_shape, variants[0].method, served, requests,
                counts, new_tokens, repeats=repeats or 2, dtype=dtype, layers=layers,
                arguments=variants[0].with_positions,
            )
        )  # fmt: skip
        lines, table = serving_summary(results), serving_rows(results)
    elif wings is not None:
        results = bench_wings(config, wings, wings_stride)
        lines, table = about_wings(results), wings_rows(results)
    elif len(variants) == 1:
        (results,) = measure(config, variants)
        lines, table = bench_summary(results), bench_rows(results)
    else:
        results = measure(config, variants)
        lines, table = about_setting(results[0]), bench_overview(results)
    for line in lines:
        print(line)
    show(as_table(table))
    if output is not None:
        write_text(output / "bench.json", to_json(results))
        intro = "".join(f"- {line}\n" for line in lines)
        write_text(output / "bench.md", f"{intro}\n{as_markdown(table)}")


def _counts(text: str, option: str, example: str) -> tuple[int, ...]:
    """Reads a list of numbers such as `1,4,16`.

    Args:
        text: what the user gave.
        option: whose value it is, for the message.
        example: a right one, for the message.

    Raises:
        InputError: if it is no such list.
    """
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        raise InputError(f"{option} {text!r} is no list of numbers from 1 on, such as {example}")
    return counts
