"""O-LoRA: LoRA whose input directions are pushed away from those of earlier tasks."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from vlm_prune.continual.config import above
from vlm_prune.continual.delta import Delta
from vlm_prune.continual.methods.gated import LowRank


def overlap(a: Tensor, earlier: Tensor) -> Tensor:
    """Returns the sum of squared inner products between the rows of A
    (r, d) and of earlier ones (n, d).
    """
    return (a @ earlier.T).square().sum()


@dataclass
class OLoRA(LowRank):
    """LoRA with a penalty on the overlap of its A with every earlier task's.

    https://arxiv.org/abs/2310.14152

    Not OLoRA, peft's orthonormal initialization. The paper keeps earlier adapters beside the
    weights; here they are merged, which gives the same outputs, and only their A is remembered.

    Args:
        orthogonality: weight of the penalty.
    """

    name: ClassVar[str] = "o-lora"
    orthogonality: float = 0.5
    _earlier: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        above("orthogonality", self.orthogonality, 0)

    def loss(self, pixels: Tensor, labels: Tensor, step: int) -> Tensor:
        loss = super().loss(pixels, labels, step)
        for name, earlier in self._earlier.items():
            a = self.layers[name].A
            loss = loss + self.orthogonality * overlap(a, earlier.to(a.device))
        return loss

    def finish(self, delta: Delta) -> Delta:
        for name, factors in delta.factors.items():
            known = self._earlier.get(name, factors.A[:0])
            self._earlier[name] = torch.cat([known, factors.A])
        return delta

    def state(self) -> dict[str, Tensor]:
        return dict(self._earlier)

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._earlier = dict(state)
