"""Prompts and labeled questions of the embedded tasks, to calibrate heads of sparse attention on."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from vlm_prune.benchmarks.evaluation.engine import (
    Samples,
    encoded_together,
    most_new_tokens,
    prompts_of,
    replies_to,
)
from vlm_prune.benchmarks.tasks import TASKS
from vlm_prune.vlm.chat import encode_prompts, render


def encoded_batches(
    model: Any,
    processor: Any,
    samples: Samples,
    batch_size: int,
    progress: Callable[[int], None] = lambda done: None,
) -> Iterator[Any]:
    """Yields what the processor makes of questions, batch by batch.

    Args:
        model: of a supported family.
        processor: the model's.
        samples: the questions.
        batch_size: how many go together.
        progress: called with the number of questions that have been used.
    """
    for questions in samples.batches(batch_size):
        for batch in encoded_together(processor, questions[:]):
            texts = [render(processor, s.messages(), add_generation_prompt=True) for s in batch]
            clips = [clip for sample in batch for clip in sample.videos]
            yield encode_prompts(model, processor, texts, [s.images for s in batch], clips)
            progress(len(batch))


@torch.inference_mode()
def accuracy_on(
    model: Any, processor: Any, samples: Samples, batch_size: int
) -> Callable[[], float]:
    """Returns a function that answers questions with the model as it then is, and gives the share that is
    right; images are encoded once.

    Args:
        model: of a supported family.
        processor: the model's.
        samples: the questions.
        batch_size: how many are answered together.
    """
    batches = [
        group
        for questions in samples.batches(batch_size)
        for group in encoded_together(processor, questions[:])
    ]
    prompts = [prompts_of(model, processor, batch) for batch in batches]

    @torch.inference_mode()
    def accuracy() -> float:
        right = 0.0
        for batch, own in zip(batches, prompts, strict=True):
            replies, _, _ = replies_to(model, processor, own, most_new_tokens(batch))
            for sample, reply in zip(batch, replies, strict=True):
                right += TASKS[sample.id.split("/")[0]].score(reply, sample.answer)
        return right / len(samples)

    return accuracy
