"""Qwen3.5 in transformers: Qwen3-VL's tower without deepstack, over a decoder of mostly linear attention.

Three of four decoder layers keep a state of fixed size instead of keys and values, and have no scores
of attention: cuts inside the language model stand next to one of the others. Layers behind a cut keep a
state of the tokens that are left. `restore` adds to logits of attention, and is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from vlm_prune.vlm.families.base import Family, Kind, Need
from vlm_prune.vlm.families.qwen3_vl import Qwen3VL


@dataclass(frozen=True)
class Qwen35(Qwen3VL):
    """Paths into a `Qwen3_5ForConditionalGeneration`."""

    lacks: ClassVar[frozenset[Need]] = Qwen3VL.lacks | {"softmax attention in every decoder layer"}
    kinds: ClassVar[tuple[Kind, ...]] = ("image",)

    def output(
        self, features: Sequence[Tensor], deepstack: Sequence[list[Tensor]] = ()
    ) -> dict[str, Any]:
        return Family.output(self, features)
