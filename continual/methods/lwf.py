"""Learning without Forgetting: keep what the previous model says about earlier classes."""

from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from vlm_prune.continual.clip import Clip
from vlm_prune.continual.config import above
from vlm_prune.continual.delta import Delta
from vlm_prune.continual.losses import distil
from vlm_prune.continual.methods.base import Context, ParameterGroup
from vlm_prune.continual.methods.full import FullFineTune


@dataclass
class LwF(FullFineTune):
    """Full fine-tuning plus distillation, on the current images, over earlier tasks' classes.

    https://arxiv.org/abs/1606.09282

    The paper's heads are CLIP's class prompts here. In the first task there are no earlier classes
    and nothing is distilled.

    Args:
        weight: of the distillation.
        temperature: of the distillation.
    """

    name: ClassVar[str] = "lwf"
    weight: float = 1.0
    temperature: float = 2.0
    _teacher: Clip | None = field(default=None, init=False, repr=False)
    _targets: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        above("weight", self.weight, 0)
        above("temperature", self.temperature, 0, strict=True)

    def begin_task(self, context: Context) -> list[ParameterGroup]:
        self._teacher = self._targets = None
        if len(context.earlier):
            self._targets = context.encode(context.earlier)
            frozen = deepcopy(context.clip.model).requires_grad_(False)
            self._teacher = replace(context.clip, model=frozen)
        return super().begin_task(context)

    def loss(self, pixels: Tensor, labels: Tensor, step: int) -> Tensor:
        images, real = self.features(pixels, labels)
        loss = self.supervised(images, real, step)
        if self._teacher is None or self._targets is None:
            return loss
        context, scale = self.context, self.context.clip.scale
        with torch.no_grad():
            before = context.gather(self._teacher.encode_image(pixels))
            before = before[context.gather(labels) >= 0]
        texts = self._targets
        if context.clip.trains("text"):
            texts = context.clip.encode_text(context.earlier.to(context.clip.device))
        ours, theirs = scale * images @ texts.T, scale * before @ self._targets.T
        return loss + self.weight * distil(ours, theirs, self.temperature)

    def end_task(self) -> Delta | None:
        self._teacher = self._targets = None
        return super().end_task()
