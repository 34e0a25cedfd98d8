"""LLaVA-NeXT-Video in transformers: LLaVA-NeXT whose videos are frames of one tile each.

What the tower says about a frame is pooled before the projector, by 2 x 2 in the published checkpoints;
attention and pixels of a token are the means over what is pooled. No newline tokens separate frames.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from vlm_prune.vlm.encoded import Group, Images
from vlm_prune.vlm.families.base import KINDS, Kind
from vlm_prune.vlm.families.llava_next import LlavaNext


@dataclass(frozen=True)
class LlavaNextVideo(LlavaNext):
    """Paths into a `LlavaNextVideoForConditionalGeneration`."""

    kinds: ClassVar[tuple[Kind, ...]] = KINDS

    def videos(self, output: Any, pixel_values: Tensor, **inputs: Tensor) -> Images:
        """Returns the encoded videos of (M, T, 3, H, W) frames, all of one group."""
        count, frames = pixel_values.shape[:2]
        with torch.no_grad():
            pooled = self.model.model.vision_resampler(self.features(output.hidden_states))
        features = pooled.unflatten(0, (count, frames)).flatten(1, 2)
        tokens = self.video_tokens(output, pixel_values, features, output.pooler_output)
        flops = self.tower_flops([self.tokens_per_image] * frames)
        return Images([Group(list(range(count)), tokens, flops=flops)])

    def video_grids(self, inputs: Mapping[str, Any]) -> list[tuple[int, int, int]]:
        pixels, stride = inputs["pixel_values_videos"], self.model.config.spatial_pool_stride
        rows, columns = (side // stride for side in self.patches_of(pixels))
        return [(pixels.shape[1], rows, columns)] * len(pixels)

    @property
    def tokens_per_frame(self) -> int:
        side: int = round(self.tokens_per_image**0.5) // self.model.config.spatial_pool_stride
        return side**2

    def pooled(self, grid: Tensor) -> Tensor:
        return avg_pool2d(grid, self.model.config.spatial_pool_stride)
