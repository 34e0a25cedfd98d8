"""`vlm-prune calibrate`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from vlm_prune.benchmarks.cli.options import (
    Adapter,
    AttentionArgs,
    Attn,
    BatchSize,
    Device,
    DeviceMap,
    Dtype,
    Limit,
    Model,
    Quantization,
    Seed,
    Tasks,
    parse_arguments,
    parse_tasks,
)
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.registry import unknown
from vlm_prune.vlm.common.terminal import progress, quiet

CALIBRATED = ("sale", "act", "seer")
STEPS = 500


def calibrate_command(
    method: Annotated[str, typer.Argument(help="Of sparse attention: sale, act or seer.")],
    output: Annotated[Path, typer.Argument(help="File to write, such as sale.safetensors.")],
    model: Model = "tiny",
    tasks: Tasks = "auto",
    limit: Limit = 100,
    batch_size: BatchSize = 8,
    attention_args: AttentionArgs = "",
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps of seer's gates; 500.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    quantization: Quantization = None,
    attn: Attn = None,
    adapter: Adapter = None,
    seed: Seed = 0,
) -> None:
    """Find for each head of a model what a method of sparse attention needs, on validation questions."""
    from vlm_prune.benchmarks.evaluation.engine import samples_of
    from vlm_prune.benchmarks.experiments.calibrate import accuracy_on, encoded_batches
    from vlm_prune.benchmarks.tasks import TASKS
    from vlm_prune.pruning.attention import (
        build_attention,
        calibrate_act,
        calibrate_sale,
        train_gates,
    )
    from vlm_prune.pruning.attention.base import SparseAttention
    from vlm_prune.vlm.common.files import check_output
    from vlm_prune.vlm.load import load

    quiet()
    if method not in CALIBRATED:
        raise InputError(unknown("method to calibrate", method, CALIBRATED))
    if steps is not None and method != "seer":
        raise InputError(f"--steps are those of seer's training; leave them out with {method}")
    built: Any = build_attention(method, **{"density": None} | parse_arguments(attention_args))
    names = parse_tasks(tasks, model)
    if others := [name for name in names if name not in TASKS]:
        raise InputError(
            f"{others[0]} has no validation questions here; give embedded tasks, such as exist,count"
        )
    if limit < len(names):
        raise InputError(f"limit {limit} is below one question for {len(names)} tasks")
    if built.calibration:
        raise InputError("a calibration is what this finds; leave it out of --attention-args")
    check_output(output)
    loaded, processor = load(
        model, device, dtype, device_map=device_map, quantization=quantization, attn=attn,
        adapter=adapter,
    )  # fmt: skip
    # without the file that is to be found
    SparseAttention.admit(built, loaded)
    samples = samples_of(names, limit, seed, "val")
    if method == "sale":
        with progress(len(samples)) as advance:
            found = calibrate_sale(
                loaded, encoded_batches(loaded, processor, samples, batch_size, advance), built
            )
        dense = sum(int((heads == 0).sum()) for heads in found.of_layers("thresholds").values())
        heads = sum(map(len, found.of_layers("thresholds").values()))
        print(f"thresholds of {heads} heads, {dense} of which keep everything")
    elif method == "seer":
        count = steps or STEPS
        with progress(len(samples) + count, "questions and steps") as advance:
            found = train_gates(
                loaded,
                encoded_batches(loaded, processor, samples, batch_size, advance),
                built,
                count,
                seed=seed,
                progress=lambda: advance(1),
            )
        before, after = found.about["divergence"]
        print(
            f"gates of {len(found.of_layers('key'))} layers; their divergence from attention fell from "
            f"{before:.3f} to {after:.3f}"
        )
    else:
        accuracy = accuracy_on(loaded, processor, samples, batch_size)
        with progress(1, "passes") as advance:
            found = calibrate_act(loaded, accuracy, built, lambda done, passes: advance(1 / passes))
        chosen = found.of_layers("heads").values()
        print(
            f"{sum(int(own.sum()) for own in chosen)} of {sum(map(len, chosen))} heads raise the share "
            f"of right answers, {100 * found.about['accuracy']:.1f} % of {len(samples)} questions"
        )
    found.save(output)
    rule = "" if method == "seer" else "density=null,"
    print(
        f"{output}: for eval and compare --attention {method} "
        f"--attention-args {rule}calibration={output}"
    )
