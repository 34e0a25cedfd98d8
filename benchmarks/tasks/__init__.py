"""The embedded tasks: offline, deterministic, small enough for a CPU."""

from vlm_prune.benchmarks.tasks import (
    anywhere,
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
    needle,
    ocr,
    order,
    passes,
    relation,
    tally,
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
            needle,
            anywhere,
            tally,
        )
    },
)
VISUAL = ("exist", "attribute", "ocr", "count", "relation", "choice")
VIDEO = ("appears", "passes", "direction", "middle", "event", "order")
"""Tasks about videos, for models that take them."""
ALBUM = ("needle", "anywhere", "tally")
"""Tasks about six images in one prompt: in one of them, in any, and in all."""

__all__ = ["ALBUM", "TASKS", "VIDEO", "VISUAL", "Question", "Sample", "Split", "Task", "Turn"]
