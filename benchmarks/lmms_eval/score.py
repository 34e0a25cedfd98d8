"""One number and one text for each question, out of what lmms-eval logs."""

import inspect
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import numpy as np

from vlm_prune.vlm.common.errors import InputError


def score_of(task: Any, sample: dict[str, Any]) -> float:
    """Returns the score of a question: the first of the task's metrics that scores
    single questions, in [0, 1].

    Where a metric only has an aggregate over questions, it is that of this one alone; aggregates in
    per cent are divided by 100.

    Raises:
        InputError: if the task scores nothing here, such as a test set for submission.
    """
    for metric, aggregate in task.aggregation().items():
        if metric not in sample or metric == "submission":
            continue
        value = sample[metric]
        if isinstance(value, dict) and "score" in value:
            value = value["score"]
        elif isinstance(value, dict) and {"pred_answer", "answer"} <= value.keys():
            # choices that aggregates count by category
            value = float(value["pred_answer"] == value["answer"])
        if isinstance(value, list | tuple) and value and all(_number(v) for v in value):
            value = float(np.mean(value))
        if not _number(value):
            value = _alone(task, aggregate, value)
        if _number(value):
            return float(value) / (100 if value > 1 else 1)
    raise InputError(f"task {task.config.task!r} has no answers to score; run its validation set")


def _number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and np.isfinite(value)


def _alone(task: Any, aggregate: Any, value: Any) -> Any:
    known = inspect.signature(aggregate).parameters
    with redirect_stdout(StringIO()):
        return aggregate([value], **({"args": task.args} if "args" in known else {}))


def reply_of(task: Any, sample: dict[str, Any]) -> str:
    """Returns what the model said, or the choice that it found likeliest."""
    replies = sample["filtered_resps"]
    first = replies[0] if replies else ""
    if isinstance(first, list | tuple) and len(first) == 2 and _number(first[0]):
        return str(int(np.argmin([reply[0] for reply in replies])))
    return " | ".join(map(str, first)) if isinstance(first, list) else str(first).strip()
