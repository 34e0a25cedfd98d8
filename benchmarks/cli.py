"""The `vlm-prune` command; nothing heavy is imported before a command needs it."""

import errno
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlm_prune.vlm.errors import InputError

if TYPE_CHECKING:
    from vlm_prune.benchmarks.run import RunConfig, Variant

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Vision-token pruning for unmodified Hugging Face vision-language models.",
)

Model = Annotated[str, typer.Option(help="'tiny' (embedded), a checkpoint folder, or a hub name.")]
Method = Annotated[str, typer.Option(help="See 'vlm-prune methods'; two joined by + cascade.")]
Tasks = Annotated[str, typer.Option(help="Task names, comma-separated, or 'visual' or 'all'.")]
Limit = Annotated[int, typer.Option(min=1, help="Questions in all, spread evenly over the tasks.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Questions answered together.")]
Device = Annotated[str, typer.Option(help="A torch device: cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto.")]
Seed = Annotated[int, typer.Option(min=0, help="Decides questions and random draws.")]
Positions = Annotated[
    str, typer.Option(help="Positions of kept tokens: auto, contiguous, original.")
]
Output = Annotated[
    Path | None, typer.Option(help="Folder for results; a killed run resumes there.")
]
Split = Annotated[str, typer.Option(help="val for choosing, test for reporting.")]


def parse_budget(text: str) -> int | float:
    """`64` is a count, `0.11` a fraction."""
    from vlm_prune.vlm.tokens import check_budget

    try:
        budget: int | float = int(text)
    except ValueError:
        try:
            budget = float(text)
        except ValueError:
            raise InputError(
                f"budget {text!r} is not a number; give tokens per image (64) or a fraction (0.11)"
            ) from None
    check_budget(budget)
    return budget


def parse_arguments(text: str) -> dict[str, Any]:
    """`strategy=row,directions=16` as a dictionary; values are JSON where they can be."""
    arguments: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if not equals or not key:
            raise InputError(f"method argument {part!r} is not of the form name=value")
        try:
            arguments[key] = json.loads(value)
        except json.JSONDecodeError:
            arguments[key] = value
    return arguments


def parse_tasks(text: str) -> tuple[str, ...]:
    from vlm_prune.benchmarks.tasks import TASKS, VISUAL

    groups = {"visual": VISUAL, "all": tuple(TASKS)}
    names = groups.get(text) or tuple(name for name in text.split(",") if name)
    if not names:
        raise InputError(f"no task given; known: {', '.join(TASKS)}")
    if len(set(names)) < len(names):
        raise InputError(f"a task is named twice in {text!r}")
    return tuple(TASKS[name].name for name in names)


def _execute(configs: "list[RunConfig]", folders: list[Path]) -> list[dict[str, Any]]:
    """Run with a progress bar; without a folder of its own a run leaves nothing behind."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

    from vlm_prune.benchmarks.run import RunFolder, evaluate
    from vlm_prune.vlm.load import load

    _quiet()
    first = configs[0]
    for config in configs:
        config.variant.build(config.seed)
    runs = [RunFolder(path, config) for path, config in zip(folders, configs, strict=True)]
    model, processor = load(first.model, first.device, first.dtype)
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("questions", total=first.limit)
        return evaluate(model, processor, runs, lambda done: bar.advance(task, done))


def _quiet() -> None:
    """Leave the terminal to our own progress bar and messages."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _in_folder(output: Path | None, configs: "list[RunConfig]", names: list[str]) -> Any:
    from tempfile import TemporaryDirectory

    if output is not None:
        return _execute(configs, [output / name for name in names])
    with TemporaryDirectory(prefix="vlm-prune-") as folder:
        return _execute(configs, [Path(folder) / (name or "run") for name in names])


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
    split: Split = "test",
    output: Output = None,
) -> None:
    """Compare one pruned model with the unpruned one."""
    from vlm_prune.benchmarks.run import Variant
    from vlm_prune.benchmarks.table import run_table, show

    variant = Variant(method, parse_budget(budget), positions, parse_arguments(method_args))
    configs = _configs(
        [variant], split, tasks, model=model, limit=limit, batch_size=batch_size, device=device,
        dtype=dtype, seed=seed,
    )  # fmt: skip
    (results,) = _in_folder(output, configs, [""])
    show(run_table(results))


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
    split: Split = "test",
    output: Output = None,
) -> None:
    """Methods and budgets side by side; images and unpruned answers are computed once."""
    from vlm_prune.benchmarks.run import Variant, write_text
    from vlm_prune.benchmarks.table import as_markdown, as_table, comparison, show
    from vlm_prune.vlm.wrapper import methods

    known = [name for name in methods() if name != "none"]
    chosen = known if method == "all" else [name for name in method.split(",") if name]
    variants = [
        Variant(name, parse_budget(b), positions) for b in budget.split(",") for name in chosen
    ]
    configs = _configs(
        variants, split, tasks, model=model, limit=limit, batch_size=batch_size, device=device,
        dtype=dtype, seed=seed,
    )  # fmt: skip
    names = [f"{variant.method}-{variant.budget}" for variant in variants]
    runs = _in_folder(output, configs, names)
    lines = comparison(runs)
    show(as_table(lines))
    if output is not None:
        write_text(output / "compare.md", as_markdown(lines))


@app.command()
def bench(
    model_shape: Annotated[
        str, typer.Option(help="Architecture: llava-1.5-7b, llava-0.5b, tiny.")
    ] = "tiny",
    method: Annotated[str, typer.Option(help="See 'vlm-prune methods'.")] = "zoo",
    budget: Annotated[str, typer.Option(help="Tokens per image, or a fraction.")] = "64",
    batch: Annotated[int, typer.Option(min=1, help="Prompts per call, one image each.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Measured calls of each model.")] = 10,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens answered per prompt.")] = 16,
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16.")] = "float32",
    method_args: Annotated[str, typer.Option(help="Hyperparameters, name=value,...")] = "",
    output: Annotated[Path | None, typer.Option(help="Folder for bench.json, bench.md.")] = None,
) -> None:
    """Time a pruned and the unpruned architecture on random weights, phase by phase."""
    from vlm_prune.benchmarks.bench import BenchConfig, about, rows
    from vlm_prune.benchmarks.bench import bench as measure
    from vlm_prune.benchmarks.run import Variant, write_json, write_text
    from vlm_prune.benchmarks.table import as_markdown, as_table, show

    _quiet()
    variant = Variant(method, parse_budget(budget), arguments=parse_arguments(method_args))
    results = measure(
        BenchConfig(
            model_shape, variant, batch=batch, repeats=repeats, new_tokens=new_tokens,
            device=device, dtype=dtype,
        )
    )  # fmt: skip
    for line in about(results):
        print(line)
    show(as_table(rows(results)))
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / "bench.json", results)
        intro = "".join(f"- {line}\n" for line in about(results))
        write_text(output / "bench.md", f"{intro}\n{as_markdown(rows(results))}")


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

    _quiet()
    picture = open_image(image)
    vlm = PrunedVLM.from_pretrained(model, method, parse_budget(budget), device, dtype)
    print(vlm.answer(picture, question))


@app.command("methods")
def list_methods(
    families: Annotated[
        bool,
        typer.Option("--families", help="Print as Markdown on which model families each works."),
    ] = False,
) -> None:
    """List pruning methods."""
    from rich.table import Table

    from vlm_prune.benchmarks.support import markdown
    from vlm_prune.benchmarks.table import show
    from vlm_prune.vlm.wrapper import methods

    if families:
        typer.echo(markdown(), nl=False)
        return
    table = Table("method", "acts at", "what", "paper")
    for name, pruner in methods().items():
        what = (pruner.__doc__ or "").strip().split("\n\n")[0]
        table.add_row(name, pruner.stage, " ".join(what.split()), pruner.paper)
    show(table)


@app.command("tasks")
def list_tasks() -> None:
    """List evaluation tasks."""
    from importlib import import_module

    from rich.table import Table

    from vlm_prune.benchmarks.table import show
    from vlm_prune.benchmarks.tasks import TASKS

    table = Table("task", "image", "what", "for example")
    for name, task in TASKS.items():
        doc = (import_module(f"vlm_prune.benchmarks.tasks.{name}").__doc__ or "").strip()
        sample = task.sample(0)
        example = f"{sample.turns[-1].text} -> {sample.answer}"
        table.add_row(name, "yes" if task.visual else "no", doc.split("\n\n")[0], example)
    show(table)


@app.command("models")
def list_models() -> None:
    """List model families, and the embedded model."""
    from rich.table import Table

    from vlm_prune.benchmarks.table import show
    from vlm_prune.vlm.families import FAMILIES

    table = Table("model", "what")
    table.add_row("tiny", "the embedded LLaVA; needs no download")
    for name, family in FAMILIES.items():
        what = (sys.modules[family.__module__].__doc__ or "").strip().split("\n\n")[0]
        table.add_row(name, " ".join(what.split()))
    show(table)


def main() -> None:
    """Entry point: one line and exit code 2 for wrong input, 130 for Ctrl-C."""
    import os

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        if len(sys.argv) == 1:
            sys.argv.append("--help")
        raise SystemExit(app(standalone_mode=False))
    except typer.TyperException as error:
        _fail(" ".join(error.format_message().split()))
    except typer.Abort:
        _fail("interrupted; the same command with the same --output resumes", 130)
    except InputError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted; the same command with the same --output resumes", 130)
    except OSError as error:
        reason = error.strerror or str(error)
        hint = "; free some space and run it again" if error.errno == errno.ENOSPC else ""
        _fail(f"{error.filename or 'output'}: {reason}{hint}")


def _fail(message: str, code: int = 2) -> None:
    print(f"Error: {message}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
