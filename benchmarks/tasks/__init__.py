"""The embedded tasks: offline, deterministic, small enough for a CPU."""

from vlm_prune.benchmarks.tasks import (
    appears,
    attribute,
    choice,
    count,
    direction,
    event,
    exist,
    hallucination,
    iit,
    middle,
    ocr,
    order,
    passes,
    relation,
    text,
)
from vlm_prune.benchmarks.tasks.base import Question, Sample, Split, Task, Turn
from vlm_prune.vlm.common.registry import Registry

TASKS: Registry[Task] = Registry(
    "task",
    {
        module.TASK.name: module.TASK
        for module in (
            exist,
            attribute,
            ocr,
            count,
            relation,
            choice,
            text,
            iit,
            hallucination,
            appears,
            passes,
            direction,
            middle,
            event,
            order,
        )
    },
)
VISUAL = ("exist", "attribute", "ocr", "count", "relation", "choice")
VIDEO = ("appears", "passes", "direction", "middle", "event", "order")
"""Tasks about videos, for models that take them."""

__all__ = ["TASKS", "VIDEO", "VISUAL", "Question", "Sample", "Split", "Task", "Turn"]
