"""What happened inside a pruning block, and how long its phases took."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from vlm_prune.vlm.common.timing import now

SELECTION, VISION = "vlm-prune selection", "vlm-prune vision"


@dataclass
class Trace:
    """What happened inside a pruning block, for reports and pictures.

    `kept` holds the token indices kept of each image (after the last cut, for methods that prune inside
    the language model), `entered` those that entered a language model whose prompt was shortened,
    `available` how many tokens each image had before, `computed` for each decoder layer how many
    tokens of each image it computes, `cuts` the token indices kept at each cut, and `selection_s` /
    `vision_s` seconds spent selecting and encoding. `tower_flops` is what the tower spends on each image
    where the block encodes them. `attention` says what sparse attention computed,
    where it goes with the pruner.
    """

    kept: list[Tensor] = field(default_factory=list)
    entered: list[Tensor] = field(default_factory=list)
    available: list[int] = field(default_factory=list)
    cuts: list[list[Tensor]] = field(default_factory=list)
    computed: list[list[int]] = field(default_factory=list)
    tower_flops: list[float] = field(default_factory=list)
    selection_s: float = 0.0
    vision_s: float = 0.0
    attention: Any = None

    @property
    def layer_tokens(self) -> list[float]:
        """Returns the mean number of tokens per image that each decoder layer computes."""
        return [sum(counts) / max(1, len(counts)) for counts in self.computed]


@contextmanager
def phase_timer(phase: str, device: torch.device, trace: Trace) -> Iterator[None]:
    """Adds the time of the block to the phase's in `trace`; profilers show it under its name.

    Args:
        phase: `SELECTION` or `VISION`.
        device: whose work is waited for.
        trace: that gets the time.
    """
    start = now(device)
    with record_function(phase):
        yield
        spent = now(device) - start
    if phase == SELECTION:
        trace.selection_s += spent
    else:
        trace.vision_s += spent
