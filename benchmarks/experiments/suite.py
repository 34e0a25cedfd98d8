"""`--suite forgetting`: what learning to see cost a language model, and what Wings kept of it."""

import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from vlm_prune.benchmarks import lmms_eval
from vlm_prune.benchmarks.evaluation.engine import (
    Samples,
    encoded_together,
    most_new_tokens,
    prompts_of,
    replies_to,
    samples_of,
)
from vlm_prune.benchmarks.evaluation.environment import command_line, device_name, versions
from vlm_prune.benchmarks.evaluation.language import Language
from vlm_prune.benchmarks.evaluation.records import (
    AnswerRow,
    Gain,
    RunConfig,
    SuiteEntry,
    SuiteResults,
    SuiteTask,
)
from vlm_prune.benchmarks.evaluation.store import RESULTS, GroupFolder, RunFolder, described
from vlm_prune.benchmarks.evaluation.tables import MISSING_VALUE
from vlm_prune.benchmarks.stats.bootstrap import mean_interval
from vlm_prune.benchmarks.stats.paired import difference
from vlm_prune.benchmarks.stats.table import as_table, percent, points, show
from vlm_prune.benchmarks.tasks import TASKS, Sample
from vlm_prune.learners import from_pretrained
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.files import write_text
from vlm_prune.vlm.common.paths import DataRoot
from vlm_prune.vlm.common.records import to_json
from vlm_prune.vlm.common.registry import unknown
from vlm_prune.vlm.common.terminal import progress, quiet
from vlm_prune.vlm.common.video import FRAMES
from vlm_prune.vlm.load import load

SUITES = ("forgetting",)
TITLES = {"base": "base LLM", "vlm": "VLM", "wings": "VLM + Wings"}
PAIRS = (("vlm", "base"), ("wings", "base"), ("wings", "vlm"))
AskBatch = Callable[[list[Sample]], list[str]]
Progress = Callable[[float], None]
RoleScores = dict[str, dict[str, NDArray[np.float64]]]


def run_suite(
    name: str,
    config: RunConfig,
    base: str | None,
    output: Path | None,
    data_root: DataRoot | Path | None,
) -> None:
    """Runs a suite and prints its table.

    Args:
        name: of the suite.
        config: model, adapter, tasks and questions.
        base: text-only model to compare with.
        output: folder of the runs, where a killed one resumes; None for one that is removed.
        data_root: folder of data sets.

    Raises:
        InputError: as `run_forgetting` does, or if there is no such suite.
    """
    if name not in SUITES:
        raise InputError(unknown("suite", name, SUITES))
    quiet()
    models = 1 + (base is not None) + (config.wings is not None)
    with (
        TemporaryDirectory(prefix="vlm-prune-") as temporary,
        progress(models * config.limit) as tick,
    ):
        results = run_forgetting(config, base, output or Path(temporary), data_root, tick)
    for role, reasons in results.skipped.items():
        for task, reason in reasons.items():
            print(f"{task} skipped by {TITLES[role]}: {reason}", file=sys.stderr)
    show(as_table(suite_table(results)))
    print("accuracy; differences in points with paired 95 % bootstrap intervals")


def run_forgetting(
    config: RunConfig,
    base: str | None,
    output: Path,
    data_root: DataRoot | Path | None = None,
    tick: Progress = lambda done: None,
) -> SuiteResults:
    """Asks the base language model, the unpruned VLM and the VLM with Wings the same questions.

    Each has a folder of rows in `output`, where a killed run goes on, and which a later run with
    one more model uses again. The base model is asked what shows no image. Also writes
    `results.json`.

    Args:
        config: tasks and questions; its model is the VLM, its `wings` the adapter, if any.
        base: folder or hub name of a text-only language model, if any.
        output: the suite's folder.
        data_root: copies of data sets for lmms-eval's tasks.
        tick: called with the number of questions done.

    Raises:
        InputError: if a model or an adapter cannot be used, or nothing could be asked.
    """
    plain = replace(config, wings=None)
    configs = {"vlm": plain}
    if base is not None:
        configs = {"base": replace(plain, model=base), **configs}
    if config.wings is not None:
        configs["wings"] = config
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("a suite runs in one process; start it without accelerate launch")
    skipped: dict[str, dict[str, str]] = {}
    with ExitStack() as stack:
        group = stack.enter_context(GroupFolder(output, "suite"))
        folders = {
            role: stack.enter_context(
                RunFolder(output / role, role_config, AnswerRow, "answers", group)
            )
            for role, role_config in configs.items()
        }
        if lmms_eval.needed(config.tasks):
            skipped = _through_lmms(folders, data_root, tick)
        else:
            _embedded(folders, tick)
        results = summarize_suite(config, folders, skipped)
        if not results.tasks:
            raise InputError(f"no task could be run: {next(iter(skipped['vlm'].values()))}")
        write_text(output / RESULTS, to_json(results))
    return results


def _embedded(folders: dict[str, RunFolder[AnswerRow]], tick: Progress) -> None:
    """Fills the folders, with one model in memory at a time."""
    config = folders["vlm"].config
    samples = samples_of(config.tasks, config.limit, config.seed, config.split, config.frames)
    if "base" in folders:
        base_config = folders["base"].config
        language = Language(base_config.model, base_config.device, base_config.dtype)
        _fill(folders["base"], _asking_text(language), samples.text_alone(), tick)
        del language
    model, processor = load(config.model, config.device, config.dtype)
    for role in ("vlm", "wings"):
        if role in folders:
            adapter = folders[role].config.wings
            if adapter is not None:
                from_pretrained(model, adapter)
            _fill(folders[role], _asking(model, processor), samples, tick)


def _asking(model: Any, processor: Any) -> AskBatch:
    @torch.inference_mode()
    def ask(batch: list[Sample]) -> list[str]:
        replies: dict[str, str] = {}
        for group in encoded_together(processor, batch):
            prompts = prompts_of(model, processor, group)
            own, _, _ = replies_to(model, processor, prompts, most_new_tokens(group))
            replies |= zip([sample.id for sample in group], own, strict=True)
        return [replies[sample.id] for sample in batch]

    return ask


def _asking_text(language: Language) -> AskBatch:
    def ask(batch: list[Sample]) -> list[str]:
        texts = [language.render(sample.messages()) for sample in batch]
        tokens, _ = language.generate(texts, max_new_tokens=most_new_tokens(batch))
        return language.replies(tokens)

    return ask


def _fill(folder: RunFolder[AnswerRow], ask: AskBatch, samples: Samples, tick: Progress) -> None:
    """Asks what the folder has no rows of, in fixed slices of the questions.

    Args:
        folder: that is filled.
        ask: answers questions.
        samples: all questions of the run.
        tick: is told how many are done.
    """
    folder.check(samples.answered([folder]))
    for questions in samples.batches(folder.config.batch_size):
        if any(name not in folder.rows for name in questions.ids):
            batch = questions[:]
            replies = ask(batch)
            folder.append([_row(s, reply) for s, reply in zip(batch, replies, strict=True)])
        tick(len(questions))


def _row(sample: Sample, reply: str) -> AnswerRow:
    fields = described(sample)
    return AnswerRow(
        **fields,
        prediction=reply,
        score=TASKS[fields["task"]].score(reply, sample.answer),
        images=len(sample.images) + len(sample.videos),
    )


def _through_lmms(
    folders: dict[str, RunFolder[AnswerRow]],
    data_root: DataRoot | Path | None,
    tick: Progress,
) -> dict[str, dict[str, str]]:
    """Fills the folders where some of the tasks are lmms-eval's; returns why some
    were skipped, for each model.

    Args:
        folders: of the models, by role.
        data_root: copies of data sets, or None.
        tick: is told how many questions are done.
    """
    from vlm_prune.benchmarks.lmms_eval.alone import answer_alone
    from vlm_prune.benchmarks.lmms_eval.language import LanguageChat
    from vlm_prune.benchmarks.lmms_eval.model import PrunedChat

    config = folders["vlm"].config
    common: Any = {k: getattr(config, k) for k in ("batch_size", "device", "dtype")}
    skipped = {}
    if "base" in folders:
        language = LanguageChat(folders["base"].config.model, **common)
        language.tick = tick
        skipped["base"] = answer_alone(language, folders["base"], data_root)
        del language
    model = PrunedChat(config.model, "none", 1.0, frames=config.frames or FRAMES, **common)
    model.keep_loaded, model.tick = True, tick
    for role in ("vlm", "wings"):
        if role in folders:
            adapter = folders[role].config.wings
            if adapter is not None:
                from_pretrained(model.model, adapter)
            skipped[role] = answer_alone(model, folders[role], data_root)
    return skipped


def summarize_suite(
    config: RunConfig, folders: dict[str, RunFolder[AnswerRow]], skipped: dict[str, dict[str, str]]
) -> SuiteResults:
    """Returns the content of `results.json`.

    Args:
        config: of the suite.
        folders: answers of each role.
        skipped: for each role the tasks that were not run, with their reasons.
    """
    scores: RoleScores = {role: folder.scores() for role, folder in folders.items()}
    for role, reasons in skipped.items():
        for task in reasons:
            scores[role].pop(task, None)
    shown = {row.task for row in folders["vlm"].rows.values() if row.images}
    order = {name: number for number, name in enumerate(config.tasks)}
    names = sorted(scores["vlm"], key=lambda n: (n in shown, order.get(n, len(order)), n))
    return SuiteResults(
        suite=SUITES[0],
        models={
            role: folder.config.wings or folder.config.model for role, folder in folders.items()
        },
        seed=config.seed,
        config=config,
        versions=versions(),
        device=device_name(torch.device(config.device)),
        command=command_line(),
        tasks={name: _task(scores, name, name in shown) for name in names},
        text=_entry(scores, [name for name in names if name not in shown]),
        images=_entry(scores, [name for name in names if name in shown]),
        skipped=skipped,
    )


def _common_scores(scores: RoleScores, names: list[str]) -> RoleScores:
    """Returns the scores of the models that were asked all of some tasks."""
    return {
        role: {name: by_task[name] for name in names}
        for role, by_task in scores.items()
        if names and set(names) <= set(by_task)
    }


def _entry(scores: RoleScores, names: list[str]) -> SuiteEntry:
    common = _common_scores(scores, names)
    differences = {}
    for ours, theirs in PAIRS:
        if ours in common and theirs in common:
            gain, interval = difference(common[ours], common[theirs])
            differences[f"{ours} - {theirs}"] = Gain(accuracy=gain, ci=interval)
    return SuiteEntry(
        n=sum(len(scores["vlm"][name]) for name in names),
        accuracy={
            role: float(np.mean([values.mean() for values in by_task.values()]))
            for role, by_task in common.items()
        },
        differences=differences,
    )


def _task(scores: RoleScores, name: str, images: bool) -> SuiteTask:
    entry, common = _entry(scores, [name]), _common_scores(scores, [name])
    return SuiteTask(
        **msgspec.structs.asdict(entry),
        images=images,
        accuracy_ci={role: mean_interval(by_task[name]) for role, by_task in common.items()},
    )


def suite_table(results: SuiteResults) -> list[list[str]]:
    """Returns header and rows: tasks of text and their mean, then those with images and theirs."""
    roles = [role for role in TITLES if role in results.models]
    pairs = [f"{a} - {b}" for a, b in PAIRS if a in roles and b in roles]
    named = [" - ".join(TITLES[role] for role in pair.split(" - ")) for pair in pairs]
    table = [["task", "n", *(f"{TITLES[role]} %" for role in roles), *named]]
    for images, mean in ((False, results.text), (True, results.images)):
        entries_of_kind = {
            name: entry for name, entry in results.tasks.items() if entry.images == images
        }
        entries: dict[str, SuiteEntry] = {**entries_of_kind}
        if len(entries_of_kind) > 1:
            entries[f"mean, {'images' if images else 'text'}"] = mean
        for name, entry in entries.items():
            accuracies = [
                percent(entry.accuracy[role]) if role in entry.accuracy else MISSING_VALUE
                for role in roles
            ]
            gains = [entry.differences.get(pair) for pair in pairs]
            table.append(
                [
                    name,
                    str(entry.n),
                    *accuracies,
                    *(
                        MISSING_VALUE if gain is None else points(gain.accuracy, gain.ci)
                        for gain in gains
                    ),
                ]
            )
    return table
