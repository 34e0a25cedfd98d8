"""Qwen3-VL in transformers: Qwen2.5-VL without windows, with features for early decoder layers.

Those deepstack features go with their tokens: the same places are kept of them. They are no part of
what methods score before the language model. The attention is that of the tower's last layer, which
sees the whole image; without a CLS token, its attention is the mean over all patches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vlm_prune.vlm.families.qwen2_5_vl import Qwen25VL
from vlm_prune.vlm.projector import Projector


@dataclass(frozen=True)
class Qwen3VL(Qwen25VL):
    """Paths into a `Qwen3VLForConditionalGeneration`."""

    @property
    def projector(self) -> Projector:
        merger = self.tower.merger
        return Projector(merger.linear_fc1, merger.act_fn, merger.linear_fc2)

    def normed(self, hidden: Tensor) -> Tensor:
        normed: Tensor = self.tower.merger.norm(hidden)
        return normed

    def in_rows(self, values: Tensor, grid: Tensor) -> Tensor:
        tokens: Tensor = values.unflatten(0, (-1, self.merged))
        return tokens

    def output(
        self, features: Sequence[Tensor], deepstack: Sequence[list[Tensor]] = ()
    ) -> dict[str, Any]:
        from transformers.models.qwen3_vl.modeling_qwen3_vl import (
            BaseModelOutputWithDeepstackFeatures,
        )

        return {
            "image": BaseModelOutputWithDeepstackFeatures(
                pooler_output=list(features), deepstack_features=[list(own) for own in deepstack]
            )
        }
