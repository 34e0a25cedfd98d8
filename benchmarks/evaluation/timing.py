"""Time of the phases of one `generate` call."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from vlm_prune.benchmarks.evaluation.prompts import Prompts
from vlm_prune.vlm.common.timing import now
from vlm_prune.vlm.compiled import compilations
from vlm_prune.vlm.families import family_of
from vlm_prune.vlm.trace import Trace

T = TypeVar("T")


class PhaseClock(StoppingCriteria):  # type: ignore[misc]
    """Notes when the first token is there; never stops the generation."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start = now(device)
        self.first: float | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if self.first is None:
            self.first = now(self.device)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def criteria(self) -> StoppingCriteriaList:
        """Returns itself as `stopping_criteria` of `generate`."""
        return StoppingCriteriaList([self])

    def phases(self) -> tuple[float, float]:
        """Returns the seconds until the first token, and from there to now."""
        first = self.first or self.start
        return first - self.start, now(self.device) - first


@dataclass(frozen=True)
class Phases:
    """Seconds; `vision` is what the call itself encoded, `decode` all tokens after the first."""

    vision: float
    selection: float
    prefill: float
    decode: float


def timed_generate(
    model: Any,
    prompts: Prompts,
    pruner: Any | None = None,
    **generation: Any,
) -> tuple[Tensor, Phases, Trace]:
    """Generates once, greedily unless `generation` says otherwise, and times the phases.

    Nothing prunes prompts without images. A pruner that changes the images encodes them itself.

    Args:
        model: of a supported family.
        prompts: of a batch.
        pruner: prunes them; None for the unpruned model.
        generation: arguments of `generate`.

    Returns:
        New tokens (B, T), seconds of each phase, and what was pruned.
    """
    family, vision = family_of(model), prompts.vision
    changes_pixels = pruner is not None and pruner.stage == "input"
    counts = [] if vision is None else vision.counts
    block: Any = nullcontext(Trace(computed=[counts] * len(family.decoder.layers)))
    if vision is not None:
        generation |= (
            prompts.pixels if changes_pixels else {"mm_encoder_outputs": family.outputs(vision)}
        )
        if pruner is not None:
            block = pruner(model, None if changes_pixels else vision)
    with block as trace:
        clock = PhaseClock(model.device)
        output = model.generate(
            **prompts.tensors,
            stopping_criteria=clock.criteria(),
            **{"do_sample": False} | generation,
        )
        first, rest = clock.phases()
    prefill = first - trace.selection_s - trace.vision_s
    new = output[:, prompts.tensors["input_ids"].shape[1] :]
    return new, Phases(trace.vision_s, trace.selection_s, prefill, rest), trace


def settled(call: Callable[[], T], device: torch.device) -> T:
    """Returns what a timed call returns; it is called anew if it has compiled anything, so that the time of
    compiling is in none of its phases.

    Args:
        call: to be timed.
        device: where it computes; on a GPU the call after the compiling one still records CUDA graphs.
    """
    before = compilations()
    result = call()
    if compilations() > before:
        for _ in range(2 if device.type == "cuda" else 1):
            result = call()
    return result
