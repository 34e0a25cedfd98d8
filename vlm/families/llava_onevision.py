"""LLaVA-OneVision in transformers: LLaVA-NeXT's tiles over a SigLIP tower without a CLS token.

A prompt's only image is tiled; where a prompt has several, each is one tile. Methods that read the
CLS token's attention read the mean over all tokens of the tile. The attention is that of the last
layer, whose output the projector gets.

A video's frames are views of one tile each, shrunk to half the sides, with one newline token behind
the last.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from vlm_prune.vlm.encoded import Group, Images
from vlm_prune.vlm.families.base import KINDS, Kind, Need
from vlm_prune.vlm.families.llava_next import LlavaNext
from vlm_prune.vlm.smaller import GridOf, Smaller, places_of, resized


@dataclass(frozen=True)
class LlavaOneVision(LlavaNext):
    """Paths into a `LlavaOnevisionForConditionalGeneration`."""

    lacks: ClassVar[frozenset[Need]] = frozenset({"a fixed image size"})
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

    def smaller(
        self, kind: Kind, pixel_values: Tensor, inputs: Mapping[str, Any], grid_of: GridOf
    ) -> Smaller | None:
        """Returns videos of smaller frames, given (M, T, 3, H, W) pixels, whose position embeddings are
        interpolated; None for images, whose tiles stay whole.

        Args:
            kind: what they are.
            pixel_values: of the videos.
            inputs: none.
            grid_of: says how many tokens each is to have.
        """
        if kind == "image":
            return None
        videos = len(pixel_values)
        frames, rows, columns = self.video_grids({"pixel_values_videos": pixel_values})[0]
        # a newline stands behind the frames
        placeholders = frames * rows * columns + 1
        small = grid_of(rows, columns, frames, placeholders)
        if small == (rows, columns):
            return None
        # two patches become one token on each side
        height, width = (2 * side * self.patch_size for side in small)
        pixels = resized(pixel_values.flatten(0, 1), height, width).unflatten(0, (videos, frames))
        places = places_of(small, (rows, columns), frames).to(self.device)
        return Smaller(pixels, {}, [places] * videos, [placeholders] * videos)

    def run(self, encoder: Callable[..., Any], pixel_values: Tensor, **inputs: Any) -> Any:
        """Runs tower and projector as `Family.run`; the model's own method takes no smaller frames, which
        are encoded here.
        """
        size = self.model.config.vision_config.image_size
        if tuple(pixel_values.shape[-2:]) == (size, size):
            return super().run(encoder, pixel_values, **inputs)
        output = super().run(self.model.model.vision_tower, pixel_values.flatten(0, 1))
        projected = self.model.model.multi_modal_projector(self.features(output.hidden_states))
        videos = len(pixel_values)
        tokens = self.shrunk(videos, self.patches_of(pixel_values), projected)
        newline = self.model.model.image_newline.to(tokens).expand(videos, 1, -1)
        output.pooler_output = torch.cat([tokens, newline], 1)
        return output

    def videos(self, output: Any, pixel_values: Tensor, **inputs: Tensor) -> Images:
        """Returns the encoded videos of (M, T, 3, H, W) frames, all of one group.

        The model's shrinking is applied to features and attention alike.
        """
        count, frames = pixel_values.shape[:2]
        whole = output.pooler_output
        patches = self.patches_of(pixel_values)
        features = self.shrunk(count, patches, self.features(output.hidden_states))
        tokens = self.video_tokens(output, pixel_values, features, whole[:, :-1])
        tokens = replace(tokens, available=whole.shape[1])
        # all placeholders but the last, which is a newline
        indices = torch.arange(tokens.projected.shape[1], device=whole.device)
        flops = self.tower_flops([math.prod(patches)] * frames)
        return Images([Group(list(range(count)), tokens, indices, whole[:, -1:], flops=flops)])

    def video_grids(self, inputs: Mapping[str, Any]) -> list[tuple[int, int, int]]:
        pixels = inputs["pixel_values_videos"]
        # shrinking rounds up
        rows, columns = (-(-side // 2) for side in self.patches_of(pixels))
        return [(pixels.shape[1], rows, columns)] * len(pixels)

    @property
    def tokens_per_frame(self) -> int:
        side: int = -(-round(self.tokens_per_image**0.5) // 2)
        return side * side

    def pooled(self, grid: Tensor) -> Tensor:
        half: Tensor = interpolate(
            grid, [-(-side // 2) for side in grid.shape[2:]], mode="bilinear"
        )
        return half
