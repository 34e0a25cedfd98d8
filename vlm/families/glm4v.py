"""GLM-4.1V in transformers: images of any size, 2 x 2 patches per token, three-row positions.

A convolution makes tokens of patches and counts as the tower's; the projector is the merger behind it,
of a linear layer, a norm and a gated block. The attention is that of the tower's last layer, which
sees the whole image; without a CLS token, its attention is the mean over all patches.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from vlm_prune.vlm.families.base import Kind, Need, matrices
from vlm_prune.vlm.families.qwen2_5_vl import Qwen25VL


@dataclass(frozen=True)
class Glm4v(Qwen25VL):
    """Paths into a `Glm4vForConditionalGeneration`."""

    lacks: ClassVar[frozenset[Need]] = Qwen25VL.lacks | {"a two-layer projector"}
    kinds: ClassVar[tuple[Kind, ...]] = ("image",)

    @property
    def projector(self) -> Callable[[Tensor], Tensor]:  # type: ignore[override]  # not two layers
        merger: Callable[[Tensor], Tensor] = self.tower.merger
        return merger

    def features(self, output: Any, grid: Tensor) -> Tensor:
        features: Tensor = output.last_hidden_state
        return features

    def in_rows(self, values: Tensor, grid: Tensor) -> Tensor:
        tokens: Tensor = values.unflatten(0, (-1, self.merged))
        return tokens

    def grid_flops(self, grid: Tensor) -> float:
        tokens = int(grid.prod()) // self.merged
        return super().grid_flops(grid) + 2.0 * tokens * matrices(self.tower.downsample)
