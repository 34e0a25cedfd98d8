"""What `eval` and `compare` share: checking a command line whole, then running it in its folders."""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from vlm_prune.benchmarks.cli.options import parse_tasks
from vlm_prune.benchmarks.cli.terminal import progress, quiet
from vlm_prune.vlm.common.errors import InputError

if TYPE_CHECKING:
    from vlm_prune.benchmarks.evaluation.engine import RunConfig, RunFolder, Variant
    from vlm_prune.vlm.common.paths import DataRoot


def run_configs(
    variants: "list[Variant]", split: str, tasks: str, limit: int, **common: Any
) -> "list[RunConfig]":
    """A configuration for each variant; `common` holds what is the same in all.

    Raises:
        InputError: if the split or the tasks are unknown, the limit is too low or a variant wrong.
    """
    from vlm_prune.benchmarks.evaluation.engine import RunConfig

    if split not in ("val", "test"):
        raise InputError(f"split {split!r} is not for measuring; give val or test")
    names = parse_tasks(tasks)
    if limit < len(names):
        raise InputError(f"limit {limit} is below one question for {len(names)} tasks")
    for variant in variants:
        variant.build(common["seed"])
    return [RunConfig(variant=v, split=split, tasks=names, limit=limit, **common) for v in variants]


def execute(
    configs: "list[RunConfig]",
    output: Path | None,
    names: Sequence[str],
    data_root: "DataRoot | None",
) -> "tuple[list[dict[str, Any]], list[RunFolder]]":
    """Results of runs that differ only in their variant, and the folders that hold their rows.

    Args:
        configs: of the runs.
        output: where each run has a folder of its name; without one nothing stays on the disk.
        names: of the runs.
        data_root: copies of data sets for lmms-eval's tasks.

    Raises:
        InputError: if the model, a folder or the data cannot be used.
    """
    if output is not None:
        return _run(configs, [output / name for name in names], data_root)
    if "RANK" in os.environ:
        raise InputError("several processes need --output, a folder that they share")
    with TemporaryDirectory(prefix="vlm-prune-") as folder:
        return _run(configs, [Path(folder) / (name or "run") for name in names], data_root)


def _run(
    configs: "list[RunConfig]", folders: list[Path], data_root: "DataRoot | None"
) -> "tuple[list[dict[str, Any]], list[RunFolder]]":
    """Run with a progress bar."""
    from vlm_prune.benchmarks import lmms_eval
    from vlm_prune.benchmarks.evaluation.engine import RunFolder, evaluate
    from vlm_prune.vlm.load import load

    quiet()
    first = configs[0]
    with ExitStack() as stack:
        runs = [stack.enter_context(RunFolder(*own)) for own in zip(folders, configs, strict=True)]
        advance = stack.enter_context(progress(first.limit))
        loading = {
            "device_map": first.device_map, "quantization": first.quantization,
            "attn": first.attn, "adapter": first.peft,
        }  # fmt: skip
        if lmms_eval.needed(first.tasks):
            if any(loading.values()):
                raise InputError(
                    "--device-map, --quantization, --attn and --adapter are for the embedded tasks"
                )
            from vlm_prune.benchmarks.lmms_eval.run import evaluate as evaluate_lmms

            return evaluate_lmms(runs, data_root, advance), runs
        model, processor = load(first.model, first.device, first.dtype, **loading)
        if first.wings is not None:
            from vlm_prune.learners import from_pretrained

            from_pretrained(model, first.wings)
        return evaluate(model, processor, runs, advance), runs
