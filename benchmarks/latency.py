"""Time of the phases of one `generate` call."""

from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from vlm_prune.vlm.session import now


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
        return StoppingCriteriaList([self])

    def phases(self) -> tuple[float, float]:
        """Seconds until the first token, and from there to now."""
        first = self.first or self.start
        return first - self.start, now(self.device) - first
