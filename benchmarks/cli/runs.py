"""What `eval` and `compare` share: checking a command line whole, then running it in its folders."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from vlm_prune.benchmarks.cli.options import parse_split, parse_tasks
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.terminal import progress, quiet

if TYPE_CHECKING:
    from vlm_prune.benchmarks.evaluation.records import PairedRow, Results, RunConfig, Variant
    from vlm_prune.benchmarks.evaluation.store import RunFolder
    from vlm_prune.vlm.common.paths import DataRoot


def run_configs(
    variants: "list[Variant]", split: str, tasks: str, limit: int, **common: Any
) -> "list[RunConfig]":
    """Returns a configuration for each variant.

    Args:
        variants: methods with their budgets.
        split: of the tasks.
        tasks: their names, comma-separated.
        limit: questions in all.
        common: what is the same in all configurations.

    Raises:
        InputError: if the split or the tasks are unknown, the limit is too low or a variant wrong.
    """
    from vlm_prune.benchmarks.evaluation.records import RunConfig

    chosen, names = parse_split(split), parse_tasks(tasks, common["model"])
    if limit < len(names):
        raise InputError(f"limit {limit} is below one question for {len(names)} tasks")
    for variant in variants:
        variant.build(common["seed"])
    return [
        RunConfig(variant=variant, split=chosen, tasks=names, limit=limit, **common)
        for variant in variants
    ]


@contextmanager
def open_run_folders(
    configs: "list[RunConfig]", output: Path | None, names: Sequence[str] | None = None
) -> "Iterator[list[RunFolder[PairedRow]]]":
    """Opens a folder for each run; they and their rows are there during the block.

    Args:
        configs: of the runs.
        output: the folder; without one nothing stays on the disk.
        names: of the runs, each in a folder of its own in `output`; None for one run.

    Raises:
        InputError: if a folder cannot be used.
    """
    from vlm_prune.benchmarks.evaluation.records import PairedRow
    from vlm_prune.benchmarks.evaluation.store import GroupFolder, RunFolder

    if output is None and "RANK" in os.environ:
        raise InputError("several processes need --output, a folder that they share")
    with ExitStack() as stack:
        if output is None:
            output = Path(stack.enter_context(TemporaryDirectory(prefix="vlm-prune-"))) / "run"
        if names is None:
            yield [stack.enter_context(RunFolder(output, configs[0], PairedRow))]
            return
        group = None
        if int(os.environ.get("RANK", "0")) == 0:
            group = stack.enter_context(GroupFolder(output, "compare"))
        yield [
            stack.enter_context(RunFolder(output / name, config, PairedRow, group=group))
            for name, config in zip(names, configs, strict=True)
        ]


@dataclass
class ResultsSoFar:
    """How many questions the pruned and the unpruned model answered right, for one method.

    Args:
        folders: of the runs.
    """

    folders: "list[RunFolder[PairedRow]]"
    pruned: float = 0.0
    unpruned: float = 0.0
    counted: int = 0

    def __str__(self) -> str:
        if len(self.folders) > 1:
            return ""
        rows = self.folders[0].rows
        for name in islice(rows, self.counted, None):
            row = rows[name]
            self.pruned, self.unpruned = self.pruned + row.score, self.unpruned + row.baseline_score
        self.counted = len(rows)
        return f"right: pruned {self.pruned:g}, unpruned {self.unpruned:g} of {self.counted};"


def execute(folders: "list[RunFolder[PairedRow]]", data_root: "DataRoot | None") -> "list[Results]":
    """Returns the results of runs that differ only in their variant, with a progress bar.

    Args:
        folders: of the runs.
        data_root: copies of data sets for lmms-eval's tasks.

    Raises:
        InputError: if the model or the data cannot be used.
    """
    from vlm_prune.benchmarks import lmms_eval
    from vlm_prune.benchmarks.evaluation.engine import evaluate
    from vlm_prune.vlm.compiled import compiled_prefill
    from vlm_prune.vlm.load import load

    quiet()
    first = folders[0].config
    loading = {
        "device_map": first.device_map, "quantization": first.quantization, "attn": first.attn,
        "adapter": first.peft,
    }  # fmt: skip
    with progress(first.limit) as advance:
        if first.engine == "vllm":
            from vlm_prune.benchmarks.evaluation.served import settings_of

            settings_of(first.model, first.variant, first.seed)
        if lmms_eval.needed(first.tasks):
            if any(loading.values()) or first.compile:
                raise InputError(
                    "--device-map, --quantization, --attn, --adapter and --compile are for the embedded "
                    "tasks"
                )
            from vlm_prune.benchmarks.lmms_eval.run import evaluate_lmms

            return evaluate_lmms(folders, data_root, advance)
        model, processor = load(first.model, first.device, first.dtype, **loading)
        if first.wings is not None:
            from vlm_prune.learners import from_pretrained

            from_pretrained(model, first.wings)
        if first.engine == "vllm":
            from vlm_prune.benchmarks.evaluation.served import evaluate_served

            return evaluate_served(model, processor, folders[0], advance)
        so_far = ResultsSoFar(folders)
        with compiled_prefill(model) if first.compile else nullcontext():
            return evaluate(model, processor, folders, lambda done: advance(done, str(so_far)))
