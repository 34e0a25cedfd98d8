"""`vlm-prune compare`."""

from typing import TYPE_CHECKING, Annotated

import typer

from vlm_prune.benchmarks.cli.options import (
    Adapter,
    AllowOutside,
    AttentionArgs,
    Attn,
    BatchSize,
    Budgets,
    DataRoot,
    Device,
    DeviceMap,
    Dtype,
    Frames,
    Limit,
    Model,
    Output,
    Positions,
    Quantization,
    ScheduleFile,
    Seed,
    Split,
    Tasks,
    check_attention_options,
    check_named_once,
    check_unpruned,
    data_root_of,
    given_options,
    with_schedule,
    with_sparse_attention,
)
from vlm_prune.benchmarks.cli.runs import execute, open_run_folders, run_configs
from vlm_prune.vlm.budget import parse_budget
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.terminal import quiet

if TYPE_CHECKING:
    from vlm_prune.benchmarks.evaluation.records import Variant

TABLES = "compare.md"


def compare_command(
    context: typer.Context,
    model: Model = "tiny",
    method: Annotated[str, typer.Option(help="Names, comma-separated, or 'all'.")] = "all",
    budget: Budgets = "192,128,64,32",
    tasks: Tasks = "auto",
    limit: Limit = 200,
    frames: Frames = None,
    batch_size: BatchSize = 8,
    device: Device = "auto",
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    quantization: Quantization = None,
    attn: Attn = None,
    adapter: Adapter = None,
    seed: Seed = 0,
    positions: Positions = "auto",
    schedule: ScheduleFile = None,
    rival: Annotated[
        str, typer.Option("--against", help="A method to test against each other one, in pairs.")
    ] = "",
    attention: Annotated[
        str | None,
        typer.Option(
            help="Sparse attention beside each method, comma-separated; alone without one."
        ),
    ] = None,
    density: Annotated[
        str | None,
        typer.Option(help="Shares of the causal half that it computes, comma-separated."),
    ] = None,
    attention_args: AttentionArgs = "",
    split: Split = "test",
    data_root: DataRoot = None,
    allow_outside: AllowOutside = False,
    output: Output = None,
) -> None:
    """Compare methods and budgets side by side; images and unpruned answers are computed once."""
    from vlm_prune.benchmarks.cli.support import named_methods
    from vlm_prune.benchmarks.evaluation.records import Variant
    from vlm_prune.benchmarks.evaluation.tables import (
        against,
        comparison_table,
        first_token,
        method_name,
        overview_table,
    )
    from vlm_prune.benchmarks.stats.table import as_markdown, as_table, show
    from vlm_prune.vlm.common.files import check_output, write_text
    from vlm_prune.vlm.load import config_of

    quiet()
    check_attention_options(attention, density, attention_args)
    if attention is not None:
        check_unpruned(given_options(context))
        method = "none" if method == "all" else method
        budget = "1.0" if method == "none" else budget
    chosen = named_methods(method, lambda: config_of(model))
    budgets = [parse_budget(text) for text in budget.split(",")]
    check_named_once("method", chosen)
    check_named_once("budget", map(str, budgets))  # one token equals 1.0, all of them
    if rival and attention is not None:
        raise InputError("--against compares pruners; leave out --attention")
    if rival and rival not in chosen:
        raise InputError(f"--against {rival} is not among the methods; add it to --method")
    variants = [Variant(name, each, positions) for each in budgets for name in chosen]
    variants = with_schedule(variants, schedule)
    if attention is not None:
        variants = [
            sparse
            for variant in variants
            for sparse in with_sparse_attention(variant, attention, density, attention_args)
        ]
    configs = run_configs(
        variants, split, tasks, limit, model=model, batch_size=batch_size, device=device,
        dtype=dtype, seed=seed, device_map=device_map, quantization=quantization, attn=attn,
        peft=adapter, frames=frames,
    )  # fmt: skip
    names = [folder_name(variant) for variant in variants]
    with open_run_folders(configs, output, names) as folders:
        if output is not None:
            check_output(output / TABLES)
        runs = execute(folders, data_root_of(data_root, allow_outside))
        tables = [comparison_table(runs)]
        if len({run.budget for run in runs}) > 1 and attention is None:
            tables.append(overview_table(runs))
        if rival:
            tables.append(against(rival, runs, [folder.scores() for folder in folders]))
        if output is not None:
            write_text(output / TABLES, "\n".join(map(as_markdown, tables)))
    for rows in tables:
        show(as_table(rows))
    for run in runs:
        name = method_name(run.config.variant, run.definition)
        show(f"{name}, budget {run.budget}: first token {first_token(run)}")


def folder_name(variant: "Variant") -> str:
    """Returns the name of a variant's folder among those of other
    methods, budgets and densities.
    """
    name = f"{variant.method}-{variant.budget}".replace("/", "-per-")
    density = variant.arguments.get("attention.density")
    return name if density is None else f"{name}-density-{density}"
