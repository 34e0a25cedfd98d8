"""CLIP as it is: the control that every method must not fall below on what it has not seen."""

from dataclasses import dataclass
from typing import ClassVar

from vlm_prune.continual.delta import Delta
from vlm_prune.continual.methods.base import Context, Method, ParameterGroup


@dataclass
class ZeroShot(Method):
    """Learn nothing.

    https://arxiv.org/abs/2103.00020
    """

    name: ClassVar[str] = "zero-shot"

    def begin_task(self, context: Context) -> list[ParameterGroup]:
        self.start(context)
        context.clip.model.requires_grad_(False)
        return []

    def end_task(self) -> Delta | None:
        return None
