"""`vlm-prune eval`."""

from typing import Annotated, Any

import typer

from vlm_prune.benchmarks.cli.options import (
    Adapter,
    AllowOutside,
    AttentionArgs,
    Attn,
    BatchSize,
    Compile,
    DataRoot,
    Device,
    DeviceMap,
    Dtype,
    Frames,
    Limit,
    Method,
    MethodArgs,
    Model,
    OneBudget,
    Output,
    Positions,
    Quantization,
    ScheduleFile,
    Seed,
    Split,
    Tasks,
    Wings,
    as_flags,
    check_attention_options,
    check_engine,
    check_unpruned,
    data_root_of,
    given_options,
    parse_method_args,
    with_schedule,
    with_sparse_attention,
)
from vlm_prune.benchmarks.cli.runs import execute, open_run_folders, run_configs
from vlm_prune.vlm.budget import parse_budget
from vlm_prune.vlm.common.errors import InputError

PRUNING = {
    "method",
    "budget",
    "positions",
    "method_args",
    "schedule",
    "attention",
    "density",
    "attention_args",
}


def evaluate_command(
    context: typer.Context,
    model: Model = "tiny",
    method: Method = "zoo",
    budget: OneBudget = "64",
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
    compile: Compile = False,
    seed: Seed = 0,
    positions: Positions = "auto",
    method_args: MethodArgs = "",
    schedule: ScheduleFile = None,
    wings: Wings = None,
    split: Split = "test",
    data_root: DataRoot = None,
    allow_outside: AllowOutside = False,
    attention: Annotated[
        str | None, typer.Option(help="Sparse attention beside the method; alone without one.")
    ] = None,
    density: Annotated[
        str | None, typer.Option(help="Share of the causal half that it computes.")
    ] = None,
    attention_args: AttentionArgs = "",
    output: Output = None,
    engine: Annotated[str, typer.Option(help="What answers: hf, or vllm.")] = "hf",
    suite: Annotated[
        str | None, typer.Option(help="forgetting: base LLM, VLM and Wings, unpruned; all tasks.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Folder or hub name of a text-only LLM, for the suite.")
    ] = None,
) -> None:
    """Compare one pruned model with the unpruned one, or unpruned models with each other."""
    from vlm_prune.benchmarks.evaluation.records import Variant
    from vlm_prune.benchmarks.evaluation.tables import run_table
    from vlm_prune.benchmarks.stats.table import show

    common: dict[str, Any] = {
        "model": model, "limit": limit, "batch_size": batch_size, "device": device,
        "dtype": dtype, "seed": seed, "wings": wings, "device_map": device_map,
        "quantization": quantization, "attn": attn, "peft": adapter, "engine": engine,
        "frames": frames,
        "compile": compile,
    }  # fmt: skip
    check_engine(engine)
    others = (device_map, quantization, attn, adapter, compile, schedule, wings, suite)
    if engine == "vllm" and any(others):
        raise InputError(
            "--engine vllm runs one method on the model alone, without --device-map, --quantization, "
            "--attn, --adapter, --compile, --schedule, --wings and --suite"
        )
    if compile and any((device_map, quantization, wings, attention, suite)):
        raise InputError(
            "--compile compiles decoder layers as they are, without --device-map, --quantization, "
            "--wings, --attention and --suite"
        )
    given = given_options(context)
    if suite is not None:
        from vlm_prune.benchmarks.experiments.suite import run_suite

        if pruning := as_flags(given & PRUNING):
            options = ", ".join(pruning)
            raise InputError(f"--suite compares unpruned models; leave out {options}")
        if any((device_map, quantization, attn, adapter)):
            raise InputError(
                "--suite compares models as they are, without --device-map, --quantization, --attn "
                "and --adapter"
            )
        chosen = tasks if "tasks" in given else "all"
        (config,) = run_configs([Variant("none", 1.0)], split, chosen, **common)
        run_suite(suite, config, base, output, data_root_of(data_root, allow_outside))
        return
    if base is not None:
        raise InputError("--base is a model of a suite; add --suite forgetting")
    variant = Variant(method, parse_budget(budget), positions, parse_method_args(method_args))
    check_attention_options(attention, density, attention_args)
    if attention is not None:
        if "," in attention or "," in (density or ""):
            raise InputError(
                "eval runs one method of sparse attention at one density; give one, or use compare"
            )
        check_unpruned(given)
        alone = variant if "method" in given else Variant("none", 1.0)
        (variant,) = with_sparse_attention(alone, attention, density, attention_args)
    configs = run_configs(with_schedule([variant], schedule), split, tasks, **common)
    with open_run_folders(configs, output) as folders:
        (results,) = execute(folders, data_root_of(data_root, allow_outside))
    show(run_table(results))
