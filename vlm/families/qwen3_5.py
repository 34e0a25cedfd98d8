"""Qwen3.5 in transformers: Qwen3-VL's tower without deepstack, over a decoder of mostly linear attention.

Three of four decoder layers keep a state of fixed size instead of keys and values: a token that they
have seen is part of it, and nothing says how much each token counts. So tokens are dropped before the
language model; methods inside it are refused.
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
