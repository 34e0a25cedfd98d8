"""The `vlm-prune` command; nothing heavy is imported before a command needs it."""

import errno
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlm_prune.benchmarks import catalogue
from vlm_prune.benchmarks.arguments import (
    BatchSize,
    DataRoot,
    Device,
    Dtype,
    Limit,
    Method,
    Model,
    Output,
    Positions,
    ScheduleFile,
    Seed,
    Split,
    Tasks,
    Wings,
    parse_arguments,
    parse_budget,
    parse_tasks,
    with_schedule,
)
from vlm_prune.benchmarks.choosing import find_schedule, search
from vlm_prune.benchmarks.mapping.command import map_command
from vlm_prune.benchmarks.terminal import progress, quiet
from vlm_prune.vlm.errors import InputError

if TYPE_CHECKING:
    from vlm_prune.benchmarks.run import RunConfig, RunFolder, Variant

INTERRUPTED = 130
PRUNING = {"method", "budget", "positions", "method_args", "schedule"}

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Vision-token pruning for unmodified Hugging Face vision-language models.",
)


def _execute(
    configs: "list[RunConfig]", folders: list[Path], data_root: Path | None
) -> "tuple[list[dict[str, Any]], list[RunFolder]]":
    """Run with a progress bar; without a folder of its own a run leaves nothing behind."""
    from vlm_prune.benchmarks import lmms
    from vlm_prune.benchmarks.run import RunFolder, evaluate
    from vlm_prune.vlm.load import load

    quiet()
    first = configs[0]
    for config in configs:
        config.variant.build(config.seed)
    with ExitStack() as stack:
        runs = [stack.enter_context(RunFolder(*own)) for own in zip(folders, configs, strict=True)]
        advance = stack.enter_context(progress(first.limit))
        if lmms.needed(first.tasks):
            from vlm_prune.benchmarks.lmms.run import evaluate as evaluate_lmms

            return evaluate_lmms(runs, data_root, advance), runs
        model, processor = load(first.model, first.device, first.dtype)
        if first.wings is not None:
            from vlm_prune.learners import from_pretrained

            from_pretrained(model, first.wings)
        return evaluate(model, processor, runs, advance), runs


def _in_folder(
    output: Path | None, configs: "list[RunConfig]", names: list[str], data_root: Path | None
) -> Any:
    from tempfile import TemporaryDirectory

    if output is not None:
        return _execute(configs, [output / name for name in names], data_root)
    if "RANK" in os.environ:
        raise InputError("several processes need --output, a folder that they share")
    with TemporaryDirectory(prefix="vlm-prune-") as folder:
        return _execute(configs, [Path(folder) / (name or "run") for name in names], data_root)


def _configs(variants: "list[Variant]", split: str, tasks: str, **common: Any) -> "list[RunConfig]":
    from vlm_prune.benchmarks.run import RunConfig

    if split not in ("val", "test"):
        raise InputError(f"split {split!r} is not for measuring; give val or test")
    names = parse_tasks(tasks)
    if common["limit"] < len(names):
        raise InputError(f"limit {common['limit']} is below one question for {len(names)} tasks")
    return [RunConfig(variant=v, split=split, tasks=names, **common) for v in variants]


@app.command("eval")
def evaluate_one(
    context: typer.Context,
    model: Model = "tiny",
    method: Method = "zoo",
    budget: Annotated[str, typer.Option(help="Tokens per image, or a fraction.")] = "64",
    tasks: Tasks = "visual",
    limit: Limit = 200,
    batch_size: BatchSize = 8,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    positions: Positions = "auto",
    method_args: Annotated[str, typer.Option(help="Hyperparameters, name=value,...")] = "",
    schedule: ScheduleFile = None,
    wings: Wings = None,
    split: Split = "test",
    data_root: DataRoot = None,
    output: Output = None,
    suite: Annotated[
        str | None, typer.Option(help="forgetting: base LLM, VLM and Wings, unpruned; all tasks.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Folder or hub name of a text-only LLM, for the suite.")
    ] = None,
) -> None:
    """Compare one pruned model with the unpruned one, or unpruned models with each other."""
    from vlm_prune.benchmarks.run import Variant
    from vlm_prune.benchmarks.table import run_table, show

    common: dict[str, Any] = {
        "model": model, "limit": limit, "batch_size": batch_size, "device": device,
        "dtype": dtype, "seed": seed, "wings": wings,
    }  # fmt: skip
    given = {name for name in context.params if _is_given(context, name)}
    if suite is not None:
        from vlm_prune.benchmarks.suite import run_suite

        if pruning := sorted(given & PRUNING):
            options = ", ".join(f"--{name.replace('_', '-')}" for name in pruning)
            raise InputError(f"--suite compares unpruned models; leave out {options}")
        named = tasks if "tasks" in given else "all"
        (config,) = _configs([Variant("none", 1.0)], split, named, **common)
        run_suite(suite, config, base, output, data_root)
        return
    if base is not None:
        raise InputError("--base is a model of a suite; add --suite forgetting")
    variant = Variant(method, parse_budget(budget), positions, parse_arguments(method_args))
    variants = with_schedule([variant], schedule)
    configs = _configs(variants, split, tasks, **common)
    (results,), _ = _in_folder(output, configs, [""], data_root)
    show(run_table(results))


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


@app.command()
def compare(
    model: Model = "tiny",
    method: Annotated[str, typer.Option(help="Names, comma-separated, or 'all'.")] = "all",
    budget: Annotated[str, typer.Option(help="Budgets, comma-separated.")] = "192,128,64,32",
    tasks: Tasks = "visual",
    limit: Limit = 200,
    batch_size: BatchSize = 8,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    positions: Positions = "auto",
    schedule: ScheduleFile = None,
    rival: Annotated[
        str, typer.Option("--against", help="A method to test against each other one, in pairs.")
    ] = "",
    split: Split = "test",
    data_root: DataRoot = None,
    output: Output = None,
) -> None:
    """Methods and budgets side by side; images and unpruned answers are computed once."""
    from vlm_prune.benchmarks.run import Variant
    from vlm_prune.benchmarks.support import every_method
    from vlm_prune.benchmarks.table import against, as_markdown, as_table, comparison, show
    from vlm_prune.vlm.files import write_text

    quiet()
    chosen = every_method(model) if method == "all" else [n for n in method.split(",") if n]
    budgets = [parse_budget(text) for text in budget.split(",")]
    if not chosen:
        raise InputError("no method given; see 'vlm-prune methods'")
    for what, given in (("method", chosen), ("budget", budgets)):
        if len(set(map(str, given))) < len(given):
            raise InputError(f"a {what} is named twice in {','.join(map(str, given))}")
    if rival and rival not in chosen:
        raise InputError(f"--against {rival} is not among the methods; add it to --method")
    variants = [Variant(name, each, positions) for each in budgets for name in chosen]
    variants = with_schedule(variants, schedule)
    configs = _configs(
        variants, split, tasks, model=model, limit=limit, batch_size=batch_size, device=device,
        dtype=dtype, seed=seed,
    )  # fmt: skip
    names = [f"{variant.method}-{variant.budget}" for variant in variants]
    runs, folders = _in_folder(output, configs, names, data_root)
    tables = [comparison(runs)]
    if rival:
        tables.append(against(rival, runs, [folder.scores() for folder in folders]))
    for lines in tables:
        show(as_table(lines))
    if output is not None:
        write_text(output / "compare.md", "\n".join(map(as_markdown, tables)))


@app.command()
def bench(
    model_shape: Annotated[
        str, typer.Option(help="Architecture: tiny, llava-1.5-7b, qwen2.5-vl-3b or another's.")
    ] = "tiny",
    method: Annotated[str, typer.Option(help="See 'vlm-prune methods'.")] = "zoo",
    budget: Annotated[str, typer.Option(help="Tokens per image, or a fraction.")] = "64",
    batch: Annotated[int, typer.Option(min=1, help="Prompts per call, one image each.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Measured calls of each model.")] = 10,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens answered per prompt.")] = 16,
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16.")] = "float32",
    method_args: Annotated[str, typer.Option(help="Hyperparameters, name=value,...")] = "",
    schedule: ScheduleFile = None,
    wings: Annotated[
        int | None, typer.Option(min=1, help="Time Wings' learners of this rank, not a method.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for bench.json, bench.md.")] = None,
) -> None:
    """Time a pruned and the unpruned architecture on random weights, phase by phase."""
    from vlm_prune.benchmarks.bench import BenchConfig, about, rows
    from vlm_prune.benchmarks.bench import bench as measure
    from vlm_prune.benchmarks.run import Variant
    from vlm_prune.benchmarks.table import as_markdown, as_table, show
    from vlm_prune.benchmarks.wings_cost import about_wings, bench_wings, wings_rows
    from vlm_prune.vlm.files import write_json, write_text

    quiet()
    variant = Variant(method, parse_budget(budget), arguments=parse_arguments(method_args))
    (variant,) = with_schedule([variant], schedule)
    config = BenchConfig(
        model_shape, variant, batch=batch, repeats=repeats, new_tokens=new_tokens,
        device=device, dtype=dtype,
    )  # fmt: skip
    if wings is None:
        results = measure(config)
        lines, table = about(results), rows(results)
    else:
        results = bench_wings(config, wings)
        lines, table = about_wings(results), wings_rows(results)
    for line in lines:
        print(line)
    show(as_table(table))
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / "bench.json", results)
        intro = "".join(f"- {line}\n" for line in lines)
        write_text(output / "bench.md", f"{intro}\n{as_markdown(table)}")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="--output folders of eval or compare.")],
    output: Annotated[
        Path | None, typer.Option(help="HTML file; report.html in the first folder unless given.")
    ] = None,
    gallery: Annotated[int, typer.Option(min=0, help="Questions shown with pictures.")] = 60,
) -> None:
    """Put runs on one self-contained HTML page."""
    from vlm_prune.benchmarks.report import report

    page, found = report(runs, output, gallery)
    print(f"{page}: {len(found)} runs, {page.stat().st_size / 1e6:.1f} MB")


@app.command()
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
    from vlm_prune.vlm.images import open_image
    from vlm_prune.vlm.wrapper import PrunedVLM

    quiet()
    picture = open_image(image)
    vlm = PrunedVLM.from_pretrained(model, method, parse_budget(budget), device, dtype)
    print(vlm.answer(picture, question))


@app.command()
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
    from vlm_prune.benchmarks.demo import serve

    quiet()
    serve(model, host, port, device, dtype)


for name, listing in (
    ("methods", catalogue.methods),
    ("tasks", catalogue.tasks),
    ("models", catalogue.models),
):
    app.command(name)(listing)
app.command("schedule")(find_schedule)
app.command("search")(search)
app.command("map")(map_command)


def main() -> None:
    """Entry point: one line and exit code 2 for wrong input, 130 for Ctrl-C."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        if len(sys.argv) == 1:
            sys.argv.append("--help")
        code = app(standalone_mode=False)
        if code == INTERRUPTED:  # what typer makes of Ctrl-C inside a command
            raise KeyboardInterrupt
        raise SystemExit(code)
    except typer.TyperException as error:
        _fail(" ".join(error.format_message().split()))
    except (typer.Abort, KeyboardInterrupt):
        _fail("interrupted; the same command with the same --output resumes", INTERRUPTED)
    except InputError as error:
        _fail(str(error))
    except OSError as error:
        reason = error.strerror or str(error)
        hint = "; free some space and run it again" if error.errno == errno.ENOSPC else ""
        _fail(f"{error.filename or 'output'}: {reason}{hint}")


def _fail(message: str, code: int = 2) -> None:
    print(f"Error: {message}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
