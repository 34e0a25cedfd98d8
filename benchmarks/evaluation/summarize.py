"""What the rows of one run come to: `results.json`."""

from collections.abc import Sequence
from typing import get_type_hints

import numpy as np

from vlm_prune.benchmarks.evaluation.environment import command_line, versions
from vlm_prune.benchmarks.evaluation.records import (
    Accuracy,
    Costs,
    Machine,
    MeasuredRow,
    PairedTimes,
    Results,
    RunConfig,
    Speedup,
    TaskResult,
    Tokens,
)
from vlm_prune.benchmarks.stats.bootstrap import PairedScores, mean_interval, retained


def summarize(config: RunConfig, rows: Sequence[MeasuredRow], machine: Machine) -> Results:
    """Returns the results of a run.

    Args:
        config: of the run.
        rows: of all its questions, at least one of each task.
        machine: where the model ran.
    """
    # unpruned and pruned scores of each task's questions, in one order
    scores = {
        name: (
            np.array([row.baseline_score for row in rows if row.task == name]),
            np.array([row.score for row in rows if row.task == name]),
        )
        for name in config.tasks
    }
    # one result for each task, and the ratio of mean accuracies over tasks, which weigh the same
    tasks = {
        name: _task_result([row for row in rows if row.task == name], {name: score})
        for name, score in scores.items()
    }
    point, interval = retained(scores)
    # medians over questions, of each phase on its own
    times = PairedTimes(
        **{
            key: float(np.median([getattr(row.time_ms, key) for row in rows]))
            for key in get_type_hints(PairedTimes)
        }
    )
    # selection counts as part of the pruned prefill, and vision on both sides
    before, after = times.baseline_prefill, times.selection + times.prefill
    whole = times.baseline_vision + before + times.baseline_decode
    tokens = _tokens(config, rows, machine)
    densities = [_mean(row.densities) for row in rows if row.densities]
    chosen = [row.chosen_density for row in rows if row.chosen_density is not None]
    return Results(
        model=config.model,
        method=config.variant.method,
        budget=config.variant.budget,
        definition=config.variant.build(config.seed).definition(len(rows[0].layer_tokens)),
        seed=config.seed,
        config=config,
        versions=versions(),
        device=machine.device,
        command=command_line(),
        tasks=tasks,
        overall=Accuracy(
            accuracy=_mean([task.accuracy for task in tasks.values()]),
            baseline_accuracy=_mean([task.baseline_accuracy for task in tasks.values()]),
            retained=point,
            ci=interval,
        ),
        fixed_size=machine.tokens_per_image is not None,
        tokens=tokens,
        time_ms=times,
        speedup=Speedup(
            prefill=before / after, end_to_end=whole / (times.vision + after + times.decode)
        ),
        flops=_mean_costs([row.flops for row in rows]),
        kv_bytes=_mean_costs([row.kv_bytes for row in rows]),
        peak_memory_bytes=machine.peak_memory_bytes,
        density=_mean(densities) if densities else None,
        chosen_density=_mean(chosen) if chosen else None,
    )


def _task_result(rows: Sequence[MeasuredRow], scores: PairedScores) -> TaskResult:
    """Returns the results of one task, whose scores come under its name alone."""
    ((unpruned, pruned),) = scores.values()
    point, interval = retained(scores)
    return TaskResult(
        n=len(rows),
        accuracy=float(pruned.mean()),
        baseline_accuracy=float(unpruned.mean()),
        accuracy_ci=mean_interval(pruned),
        retained=point,
        ci=interval,
        kept=_per_image(rows, [_mean(row.layer_tokens) for row in rows]),
    )


def _tokens(config: RunConfig, rows: Sequence[MeasuredRow], machine: Machine) -> Tokens:
    """Returns the image tokens, unpruned and in three ways.

    Args:
        config: of the run.
        rows: of all its questions.
        machine: where the model ran.
    """
    full: float = _per_image(rows, [_mean(row.image_tokens) for row in rows])
    if machine.tokens_per_image is not None:
        full = machine.tokens_per_image
    pruner, shown = config.variant.build(config.seed), [row for row in rows if row.images]
    # the paper's count is given where it is defined for every question with images
    papers = [pruner.papers_count(round(full), row.layer_tokens) for row in shown]
    counted = [count for count in papers if count is not None]
    return Tokens(
        full=round(full) if full == round(full) else full,
        kept=_per_image(rows, [row.layer_tokens[-1] for row in rows], full),
        layer_mean=_per_image(rows, [_mean(row.layer_tokens) for row in rows], full),
        papers=_per_image(shown, counted, full) if len(counted) == len(shown) else None,
    )


def _per_image(rows: Sequence[MeasuredRow], values: list[float], without: float = 0.0) -> float:
    """Returns the mean over all images of what rows say about theirs.

    Args:
        rows: of questions.
        values: one of each row, a mean over the row's images.
        without: what is returned if no row has images.
    """
    # rows hold means over their images, so that they weigh by how many these are
    images = [row.images for row in rows]
    return float(np.average(values, weights=images)) if any(images) else without


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0


def _mean_costs(costs: list[Costs]) -> Costs:
    return Costs(
        baseline=_mean([each.baseline for each in costs]),
        pruned=_mean([each.pruned for each in costs]),
    )
