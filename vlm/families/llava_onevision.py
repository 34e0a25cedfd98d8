"""LLaVA-OneVision in transformers: LLaVA-NeXT's tiles over a SigLIP tower without a CLS token.

A prompt's only image is tiled; where a prompt has several, each is one tile. Methods that read the
CLS token's attention read the mean over all tokens of the tile. The attention is that of the last
layer, whose output the projector gets.

A video's frames are views of one tile each, shrunk to half the sides, with one newline token behind
the last.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlm_prune.vlm.encoded import Group, Images
from vlm_prune.vlm.families.base import KINDS, Kind
from vlm_prune.vlm.families.llava_next import LlavaNext


@dataclass(frozen=True)
class LlavaOneVision(LlavaNext):
    """Paths into a `LlavaOnevisionForConditionalGeneration`."""

    image_inputs: ClassVar[tuple[str, ...]] = (
        "image_sizes", "batch_num_images", "vision_aspect_ratio",
    )  # fmt: skip
    kinds: ClassVar[tuple[Kind, ...]] = KINDS
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

    def videos(self, output: Any, pixel_values: Tensor, **inputs: Tensor) -> Images:
        """Returns the encoded videos of (M, T, 3, H, W) frames, all of one group.

        The model's shrinking is applied to features and attention alike.
        """
        count, frames = pixel_values.shape[:2]
        whole = output.pooler_output
        features = self.shrunk(count, self.features(output.hidden_states))
        tokens = self.video_tokens(output, pixel_values, features, whole[:, :-1])
        tokens = replace(tokens, available=whole.shape[1])
        # all placeholders but the last, which is a newline
        indices = torch.arange(tokens.projected.shape[1], device=whole.device)
        flops = self.tower_flops([self.tokens_per_image] * frames)
        return Images([Group(list(range(count)), tokens, indices, whole[:, -1:], flops=flops)])

    def video_grids(self, inputs: Mapping[str, Any]) -> list[tuple[int, int, int]]:
        pixels = inputs["pixel_values_videos"]
        # shrinking rounds up
        side = -(-(pixels.shape[-1] // self.patch_size) // 2)
        return [(pixels.shape[1], side, side)] * len(pixels)

    def shrunk(self, videos: int, values: Tensor) -> Tensor:
        """Shrinks frames (M T, S, c) as the model does, in the order of their videos, (M, N, c)."""
        pooled: Tensor = self.model.model.apply_pooling(values).unflatten(0, (videos, -1))
        return pooled.flatten(1, 2)
