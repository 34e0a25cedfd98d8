"""Commands about one question, one machine, or runs that are there: they fill no run folder."""

from pathlib import Path
from typing import Annotated, Any

import typer

from vlm_prune.benchmarks.cli.options import (
    DataRoot,
    Device,
    Dtype,
    Method,
    Model,
    ScheduleFile,
    parse_arguments,
    parse_budget,
    with_schedule,
)
from vlm_prune.benchmarks.cli.terminal import quiet


def bench(
    model_shape: Annotated[
        str, typer.Option(help="Architecture: tiny, llava-1.5-7b, qwen2.5-vl-3b or another's.")
    ] = "tiny",
    method: Annotated[
        str, typer.Option(help="See 'vlm-prune methods'; several comma-separated, or all.")
    ] = "zoo",
    budget: Annotated[str, typer.Option(help="Tokens per image, or a fraction.")] = "64",
    batch: Annotated[int, typer.Option(min=1, help="Prompts per call, one image each.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Measured calls of each model.")] = 10,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens answered per prompt.")] = 16,
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16.")] = "float32",
    layers: Annotated[
        int | None, typer.Option(help="Decoder layers, where all are too many for the machine.")
    ] = None,
    method_args: Annotated[str, typer.Option(help="Hyperparameters, name=value,...")] = "",
    schedule: ScheduleFile = None,
    wings: Annotated[
        int | None, typer.Option(min=1, help="Time Wings' learners of this rank, not a method.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for bench.json, bench.md.")] = None,
) -> None:
    """Time a pruned and the unpruned architecture on random weights, phase by phase."""
    from vlm_prune.benchmarks.cli.support import named_methods
    from vlm_prune.benchmarks.evaluation.engine import Variant
    from vlm_prune.benchmarks.speed.bench import BenchConfig
    from vlm_prune.benchmarks.speed.bench import bench as measure
    from vlm_prune.benchmarks.speed.bench_table import about, about_setting, overview, rows
    from vlm_prune.benchmarks.speed.shapes import SHAPES
    from vlm_prune.benchmarks.speed.wings_cost import about_wings, bench_wings, wings_rows
    from vlm_prune.benchmarks.stats.table import as_markdown, as_table, show
    from vlm_prune.vlm.common.files import write_json, write_text
    from vlm_prune.vlm.families import FAMILIES

    quiet()
    names = named_methods(method, lambda: FAMILIES[SHAPES[model_shape]().model_type])
    more = parse_arguments(method_args)
    variants = [Variant(name, parse_budget(budget), arguments=more) for name in names]
    variants = with_schedule(variants, schedule)
    config = BenchConfig(
        model_shape, variants[0], batch=batch, repeats=repeats, new_tokens=new_tokens,
        device=device, dtype=dtype, layers=layers,
    )  # fmt: skip
    results: Any
    if wings is not None:
        results = bench_wings(config, wings)
        lines, table = about_wings(results), wings_rows(results)
    elif len(variants) == 1:
        (results,) = measure(config, variants)
        lines, table = about(results), rows(results)
    else:
        results = measure(config, variants)
        lines, table = about_setting(results[0]), overview(results)
    for line in lines:
        print(line)
    show(as_table(table))
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / "bench.json", results)
        intro = "".join(f"- {line}\n" for line in lines)
        write_text(output / "bench.md", f"{intro}\n{as_markdown(table)}")


def report(
    runs: Annotated[list[Path], typer.Argument(help="--output folders of eval or compare.")],
    output: Annotated[
        Path | None, typer.Option(help="HTML file; report.html in the first folder unless given.")
    ] = None,
    gallery: Annotated[int, typer.Option(min=0, help="Questions shown with pictures.")] = 60,
    data_root: DataRoot = None,
) -> None:
    """Put runs on one self-contained HTML page."""
    from vlm_prune.benchmarks.report import report

    page, found = report(runs, output, gallery, data_root)
    print(f"{page}: {len(found)} runs, {page.stat().st_size / 1e6:.1f} MB")


def ask(
    image: Annotated[Path, typer.Argument(help="An image file.")],
    question: Annotated[str, typer.Argument(help="A question about it.")],
    model: Model = "tiny",
    method: Method = "zoo",
    budget: Annotated[str, typer.Option(help="Tokens per image, or a fraction.")] = "64",
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


def demo(
    model: Model = "tiny",
    host: Annotated[str, typer.Option(help="Address to serve at; others can reach 0.0.0.0.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to serve at.")] = 7860,
    device: Device = "cpu",
    dtype: Dtype = "auto",
) -> None:
    """Serve a page to try methods on: answers, kept tokens and times, pruned and unpruned."""
    from vlm_prune.benchmarks.report.demo import serve

    quiet()
    serve(model, host, port, device, dtype)
