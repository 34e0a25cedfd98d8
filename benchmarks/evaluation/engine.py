"""Run methods against the unpruned model over tasks; killed at any moment, it resumes."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, TypeVar, overload

import msgspec
import torch

from vlm_prune.benchmarks.evaluation.costs import machine_of, paired_costs
from vlm_prune.benchmarks.evaluation.prompts import Prompts, make_prompts
from vlm_prune.benchmarks.evaluation.records import (
    MeasuredRow,
    PairedRow,
    PairedTimes,
    PromptRecord,
    Results,
    number_of,
)
from vlm_prune.benchmarks.evaluation.store import QuestionFields, RunFolder, described
from vlm_prune.benchmarks.evaluation.summarize import summarize
from vlm_prune.benchmarks.evaluation.timing import Phases, settled, timed_generate
from vlm_prune.benchmarks.tasks import TASKS, Sample, Split
from vlm_prune.benchmarks.tasks.base import question_id, shares
from vlm_prune.vlm.budget import tokens_for
from vlm_prune.vlm.chat import render, rows_encoded_together
from vlm_prune.vlm.families import family_of
from vlm_prune.vlm.trace import Trace

T = TypeVar("T")
ANY_SIZE = 4096
"""Tokens of an image by which counts and shares are compared where images have any number."""
# from a batch and pruners to the rows of each pruner
Answer = Callable[[list[Sample], list[Any]], Iterable[list[PairedRow]]]


def most_new_tokens(batch: list[Sample]) -> int:
    """Returns how long the longest answer to a batch may be, by its tasks."""
    return max(TASKS[sample.id.split("/")[0]].new_tokens for sample in batch)


class Samples(Sequence[Sample]):
    """Questions of the embedded tasks; each is drawn where it is looked up, so that none is held.

    Args:
        ids: of the questions, `exist/000012`.
        seed: of the questions.
        split: train, val or test.
        frames: of a video, at most; all unless given.
    """

    def __init__(self, ids: list[str], seed: int, split: Split, frames: int | None = None) -> None:
        self.ids, self.seed, self.split, self.frames = ids, seed, split, frames

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...

    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self._drawn(name) for name in self.ids[index]]
        return self._drawn(self.ids[index])

    def _drawn(self, name: str) -> Sample:
        task = name.split("/")[0]
        return drawn_sample(task, number_of(name, task), self.seed, self.split, self.frames)

    def batches(self, size: int) -> "Iterator[Samples]":
        """Yields the questions in batches, which draw none of them yet."""
        for start in range(0, len(self), size):
            yield self._of(self.ids[start : start + size])

    def _of(self, ids: list[str]) -> "Samples":
        return Samples(ids, self.seed, self.split, self.frames)

    def text_alone(self) -> "Samples":
        """Returns the questions of the tasks that do not ask about an image."""
        ids = [name for name in self.ids if not TASKS[name.split("/")[0]].visual]
        return self._of(ids)

    def answered(self, folders: Iterable[RunFolder[Any]]) -> dict[str, QuestionFields]:
        """Returns what was asked in the questions of which any folder has a row."""
        done = set().union(*(folder.rows for folder in folders))
        return {name: described(self._drawn(name)) for name in self.ids if name in done}


def drawn_sample(
    task: str, number: int, seed: int, split: Split, frames: int | None = None
) -> Sample:
    """Returns a question of an embedded task.

    Args:
        task: its name.
        number: of the question.
        seed: of the questions.
        split: train, val or test.
        frames: of a video, at most; all unless given.
    """
    sample = TASKS[task].sample(number, seed, split)
    if frames is None:
        return sample
    turns = (
        turn if turn.video is None else replace(turn, video=turn.video.thinned(frames))
        for turn in sample.turns
    )
    return replace(sample, turns=tuple(turns))


def samples_of(
    tasks: tuple[str, ...], limit: int, seed: int, split: Split, frames: int | None = None
) -> Samples:
    """Returns `limit` questions in all, spread evenly over the tasks.

    Args:
        tasks: names of embedded tasks.
        limit: how many.
        seed: of the questions.
        split: train, val or test.
        frames: of a video, at most; all unless given.
    """
    counts = shares(tasks, limit).items()
    ids = [question_id(name, index) for name, share in counts for index in range(share)]
    return Samples(ids, seed, split, frames)


def evaluate(
    model: Any,
    processor: Any,
    folders: list[RunFolder[PairedRow]],
    progress: Callable[[int], None] = lambda done: None,
    answer: Answer | None = None,
) -> list[Results]:
    """Fills the folders, which differ only in their variant, and returns their results.

    Images are encoded once and the unpruned answers made once for all folders; methods that stand for the
    same one answer once, and a method whose budgets share an order of tokens finds it once. Batches are
    fixed slices of the sample list, so a resumed run computes the very batches that are missing.

    Args:
        model: of a supported family.
        processor: the model's.
        folders: of the runs.
        progress: called with the number of questions done.
        answer: makes the rows of a batch; the model does unless given.

    Raises:
        InputError: if a method does not go with the model, or a folder has rows that are not of
            these questions.
    """
    config = folders[0].config
    samples = samples_of(config.tasks, config.limit, config.seed, config.split, config.frames)
    pruners = [
        folder.config.variant.build(config.seed).prepared(model, processor) for folder in folders
    ]
    answered = samples.answered(folders)
    for folder, pruner in zip(folders, pruners, strict=True):
        pruner.admit(model)
        folder.check(answered)
    # the largest budget first: its order of tokens serves the smaller ones
    family = family_of(model)
    tokens = family.tokens_per_image if family.fixed_size else ANY_SIZE
    runs = sorted(
        zip(folders, pruners, strict=True),
        key=lambda run: -tokens_for(run[0].config.variant.budget, tokens),
    )
    answer, warm = answer or partial(_answer, model, processor), False
    for questions in samples.batches(config.batch_size):
        names = questions.ids
        missing = [
            (folder, pruner)
            for folder, pruner in runs
            if any(name not in folder.rows for name in names)
        ]
        if missing:
            batch = questions[:]
            if not warm:  # the first pass pays for allocations and lazy hooks
                count = len(batch) if config.compile else 1
                for _ in answer(batch[:count], [pruner for _, pruner in missing]):
                    warm = True
            answers = answer(batch, [pruner for _, pruner in missing])
            for (folder, _), rows in zip(missing, answers, strict=True):
                folder.append(rows)
        progress(len(names))
    results = []
    for folder in folders:
        measured = [folder.rows.read(name, MeasuredRow) for name in samples.ids]
        results.append(summarize(folder.config, measured, machine_of(model)))
        folder.finish(results[-1])
    return results


def _answer(
    model: Any, processor: Any, batch: list[Sample], pruners: list[Any]
) -> Iterator[list[PairedRow]]:
    """Yields the rows of one batch for each pruner; those that do the same share them.

    Args:
        model: that answers.
        processor: the model's.
        batch: its questions.
        pruners: of the variants.
    """
    groups = encoded_together(processor, batch)
    answers = (_answer_group(model, processor, group, pruners) for group in groups)
    for rows in zip(*answers, strict=True):
        own = {row.id: row for row in chain.from_iterable(rows)}
        yield [own[sample.id] for sample in batch]


@torch.inference_mode()
def _answer_group(
    model: Any, processor: Any, batch: list[Sample], pruners: list[Any]
) -> Iterator[list[PairedRow]]:
    """Yields the rows of questions that are answered together for each pruner.

    Args:
        model: that answers.
        processor: the model's.
        batch: the questions.
        pruners: of the variants.
    """
    prompts = prompts_of(model, processor, batch)
    encoding = prompts.vision_s
    most = most_new_tokens(batch)
    answer = partial(replies_to, model, processor, prompts, most)
    baseline, before, _ = settled(answer, model.device)
    family, share = family_of(model), 1e3 / len(batch)
    answered: list[tuple[tuple[str, Any], list[PairedRow]]] = []
    prompts_of_method: list[tuple[Any, Prompts]] = []
    for pruner in (pruner.resolved(family) for pruner in pruners):
        # one token equals 1.0, all of them
        key = (repr(pruner.budget), pruner)
        if (rows := found(answered, key)) is not None:
            yield rows
            continue
        method = replace(pruner, budget=1.0)
        if (own := found(prompts_of_method, method)) is None:
            own = prompts.sharing_orders()
            prompts_of_method.append((method, own))
        answer = partial(replies_to, model, processor, own, most, pruner)
        ours, after, trace = settled(answer, model.device)
        times = PairedTimes(
            vision=share * (after.vision or encoding),
            selection=share * after.selection,
            prefill=share * after.prefill,
            decode=share * after.decode,
            baseline_vision=share * encoding,
            baseline_prefill=share * before.prefill,
            baseline_decode=share * before.decode,
        )
        rows = [
            paired_row(model, sample, prompts.record(number, trace), one, other, times)
            for number, (sample, one, other) in enumerate(zip(batch, baseline, ours, strict=True))
        ]
        answered.append((key, rows))
        yield rows


def found(values: list[tuple[Any, T]], key: Any) -> T | None:
    """Returns the value of a key that need not be hashable, or None."""
    return next((value for known, value in values if known == key), None)


def paired_row(
    model: Any,
    sample: Sample,
    prompt: PromptRecord,
    baseline: str,
    prediction: str,
    times: PairedTimes,
) -> PairedRow:
    """Returns the row of one question.

    Args:
        model: whose operations are counted.
        sample: the question.
        prompt: its images, pruned.
        baseline: the unpruned model's answer.
        prediction: the pruned model's.
        times: of both.
    """
    score = TASKS[sample.id.split("/")[0]].score
    flops, kv_bytes = paired_costs(model, prompt)
    return PairedRow(
        **described(sample),
        baseline=baseline,
        prediction=prediction,
        baseline_score=score(baseline, sample.answer),
        score=score(prediction, sample.answer),
        **msgspec.structs.asdict(prompt),
        flops=flops,
        kv_bytes=kv_bytes,
        time_ms=times,
    )


def encoded_together(processor: Any, batch: list[Sample]) -> list[list[Sample]]:
    """Returns the questions of a batch in groups that a model can take at a time."""
    groups = rows_encoded_together(processor, [sample.videos for sample in batch])
    return [[batch[number] for number in numbers] for numbers in groups]


def prompts_of(model: Any, processor: Any, batch: list[Sample]) -> Prompts:
    """Renders and tokenizes the conversations of samples, and encodes their images and
    videos.

    Args:
        model: of a supported family.
        processor: the model's.
        batch: of samples.
    """
    texts = [render(processor, s.messages(), add_generation_prompt=True) for s in batch]
    images, videos = [list(s.images) for s in batch], [s.videos for s in batch]
    return make_prompts(model, processor, texts, images, videos)


def replies_to(
    model: Any, processor: Any, prompts: Prompts, most: int, pruner: Any | None = None
) -> tuple[list[str], Phases, Trace]:
    """Returns greedy answers to prompts, the seconds of their phases, and what was pruned.

    Selection counts orders of tokens that were found before as if they were found again.

    Args:
        model: of a supported family.
        processor: the model's.
        prompts: of a batch.
        most: tokens of an answer.
        pruner: prunes them; None for the unpruned model.
    """
    reused = prompts.reused_s
    new, phases, trace = timed_generate(model, prompts, pruner, max_new_tokens=most)
    phases = replace(phases, selection=phases.selection + prompts.reused_s - reused)
    replies = processor.batch_decode(new, skip_special_tokens=True)
    return [reply.strip() for reply in replies], phases, trace
