"""The `vlm-prune` command; nothing heavy is imported before a command needs it."""

import errno
import os
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlm_prune.benchmarks.batch.command import map_command
from vlm_prune.benchmarks.cli import commands, listings
from vlm_prune.benchmarks.cli.choosing import find_schedule, search
from vlm_prune.benchmarks.cli.options import (
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
from vlm_prune.benchmarks.cli.terminal import progress, quiet
from vlm_prune.vlm.common.errors import InputError

if TYPE_CHECKING:
    from vlm_prune.benchmarks.evaluation.engine import RunConfig, RunFolder, Variant

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
    from vlm_prune.benchmarks import lmms_eval
    from vlm_prune.benchmarks.evaluation.engine import RunFolder, evaluate
    from vlm_prune.vlm.load import load

    quiet()
    first = configs[0]
    for config in configs:
        config.variant.build(config.seed)
    with ExitStack() as stack:
        runs = [stack.enter_context(RunFolder(*own)) for own in zip(folders, configs, strict=True)]
        advance = stack.enter_context(progress(first.limit))
        if lmms_eval.needed(first.tasks):
            from vlm_prune.benchmarks.lmms_eval.run import evaluate as evaluate_lmms

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
    from vlm_prune.benchmarks.evaluation.engine import RunConfig

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
    from vlm_prune.benchmarks.evaluation.engine import Variant
    from vlm_prune.benchmarks.stats.table import run_table, show

    common: dict[str, Any] = {
        "model": model, "limit": limit, "batch_size": batch_size, "device": device,
        "dtype": dtype, "seed": seed, "wings": wings,
    }  # fmt: skip
    given = {name for name in context.params if _is_given(context, name)}
    if suite is not None:
        from vlm_prune.benchmarks.evaluation.suite import run_suite

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
    from vlm_prune.benchmarks.cli.support import named_methods
    from vlm_prune.benchmarks.evaluation.engine import Variant
    from vlm_prune.benchmarks.stats.table import (
        against,
        as_markdown,
        as_table,
        comparison,
        overview,
        show,
    )
    from vlm_prune.vlm.common.files import write_text
    from vlm_prune.vlm.load import family_type

    quiet()
    chosen = named_methods(method, lambda: family_type(model))
    budgets = [parse_budget(text) for text in budget.split(",")]
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
    if len({run["budget"] for run in runs}) > 1:
        tables.append(overview(runs))
    if rival:
        tables.append(against(rival, runs, [folder.scores() for folder in folders]))
    for lines in tables:
        show(as_table(lines))
    if output is not None:
        write_text(output / "compare.md", "\n".join(map(as_markdown, tables)))


for command in (commands.bench, commands.report, commands.ask, commands.demo):
    app.command()(command)
for name, listing in (
    ("methods", listings.methods),
    ("tasks", listings.tasks),
    ("models", listings.models),
):
    app.command(name)(listing)
app.command("schedule")(find_schedule)
app.command("search")(search)
app.command("map")(map_command)


def main() -> None:
    """Entry point: one line and exit code 2 for wrong input, 130 for Ctrl-C."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # what a launcher sends when another process of the run ended, and a scheduler at its limit
    signal.signal(signal.SIGTERM, signal.default_int_handler)
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
