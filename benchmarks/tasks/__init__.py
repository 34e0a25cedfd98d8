"""The embedded tasks: offline, deterministic, small enough for a CPU."""

from vlm_prune.benchmarks.tasks import (
    attribute,
    choice,
    count,
    exist,
    hallucination,
    iit,
    ocr,
    relation,
    text,
)
from vlm_prune.benchmarks.tasks.base import Question, Sample, Split, Task, Turn
from vlm_prune.vlm.common.registry import Registry

TASKS: Registry[Task] = Registry(
    "task",
    {
        module.TASK.name: module.TASK
        for module in (exist, attribute, ocr, count, relation, choice, text, iit, hallucination)
    },
)
VISUAL = ("exist", "attribute", "ocr", "count", "relation", "choice")

__all__ = ["TASKS", "VISUAL", "Question", "Sample", "Split", "Task", "Turn"]
