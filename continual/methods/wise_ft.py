"""WiSE-FT: fine-tune, then move part of the way back."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlm_prune.continual.config import one_of, within
from vlm_prune.continual.delta import Delta
from vlm_prune.continual.methods.base import Context, ParameterGroup
from vlm_prune.continual.methods.full import FullFineTune


@dataclass
class WiseFT(FullFineTune):
    """After each task: anchor + alpha (tuned - anchor), weight by weight.

    https://arxiv.org/abs/2109.01903

    The paper has one task; on a stream the anchor is the model before the task.

    Args:
        alpha: 1 keeps the tuned weights, 0 the anchor's.
        anchor: `previous`, the model before this task, or `initial`, before the first.
    """

    name: ClassVar[str] = "wise-ft"
    alpha: float = 0.5
    anchor: Literal["previous", "initial"] = "previous"
    _anchor: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        within("alpha", self.alpha)
        one_of("anchor", self.anchor, ("previous", "initial"))

    def begin_task(self, context: Context) -> list[ParameterGroup]:
        groups = super().begin_task(context)
        if self.anchor == "previous" or not self._anchor:
            self._anchor = self.copies()
        return groups

    @torch.no_grad()
    def end_task(self) -> Delta | None:
        for name, parameter in self.weights().items():
            anchor = self._anchor[name].to(parameter.device)
            parameter.copy_(anchor.lerp(parameter, self.alpha))
        return super().end_task()

    def state(self) -> dict[str, Tensor]:
        return dict(self._anchor) if self.anchor == "initial" else {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        if self.anchor == "initial":
            self._anchor = dict(state)
