"""LLaVA-OneVision in transformers: LLaVA-NeXT's tiles over a SigLIP tower without a CLS token.

A prompt's only image is tiled; where a prompt has several, each is one tile. Methods that read the
CLS token's attention read the mean over all tokens of the tile. The attention is that of the last
layer, whose output the projector gets.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from vlm_prune.vlm.families.llava_next import LlavaNext


@dataclass(frozen=True)
class LlavaOneVision(LlavaNext):
    """Paths into a `LlavaOnevisionForConditionalGeneration`."""

    image_inputs: ClassVar[tuple[str, ...]] = (
        "image_sizes", "batch_num_images", "vision_aspect_ratio",
    )  # fmt: skip
    by_row: ClassVar[bool] = True

    def tiles(self, inputs: Mapping[str, Any]) -> list[int]:
        tiled, in_row = super().tiles(inputs), inputs.get("batch_num_images")
        if in_row is None:
            return tiled
        alone = [int(images) == 1 for images in in_row for _ in range(int(images))]
        return [count if single else 1 for count, single in zip(tiled, alone, strict=True)]

    def pack(self, size: Tensor, values: Tensor, newline: Tensor | None) -> Tensor:
        packed, _ = self.model.model.pack_image_features(
            [values],
            [size],
            image_newline=newline,
            vision_aspect_ratio=self.model.config.vision_aspect_ratio,
        )
        tokens: Tensor = packed[0]
        return tokens
