"""LLaVA-1.5 in transformers: a CLIP tower, a two-layer projector, a Llama-style decoder.

The tower's attention is that of the layer whose output the projector gets, the last but one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlm_prune.vlm.attention import encoder_query_key
from vlm_prune.vlm.encoded import Group, Images
from vlm_prune.vlm.families.base import Family, loaded, seed_of
from vlm_prune.vlm.projector import Projector
from vlm_prune.vlm.tokens import VisionTokens


@dataclass(frozen=True)
class Llava(Family):
    """Paths into a `LlavaForConditionalGeneration`."""

    tower_prefix: ClassVar[int] = 1

    @property
    def tokens_per_image(self) -> int:
        vision = self.model.config.vision_config
        return int((vision.image_size // vision.patch_size) ** 2)

    @property
    def tower_layers(self) -> Any:
        tower = self.model.model.vision_tower
        return getattr(tower, "vision_model", tower).encoder.layers

    @property
    def prefix(self) -> int:
        """Tokens of the tower in front of the patches: the CLS token."""
        return 1 if self.model.config.vision_feature_select_strategy == "default" else 0

    @property
    def states_read(self) -> tuple[int, ...]:
        layer = int(self.model.config.vision_feature_layer)
        return layer, layer - 1

    def run(self, encoder: Callable[..., Any], pixel_values: Tensor, **inputs: Any) -> Any:
        """Sizes other than the trained one interpolate the position embeddings."""
        size = self.model.config.vision_config.image_size
        pixels = pixel_values.to(self.model.dtype)
        if tuple(pixels.shape[-2:]) == (size, size):
            return super().run(encoder, pixels, **inputs)
        tower = self.model.model.vision_tower
        # a table that is interpolated is read, not called
        with loaded(getattr(tower, "vision_model", tower).embeddings.position_embedding):
            return super().run(encoder, pixels, **inputs | {"interpolate_pos_encoding": True})

    def images(self, output: Any, pixel_values: Tensor, **inputs: Tensor) -> Images:
        """Images of (M, 3, H, W) pixels, all of one group."""
        config = self.model.config
        patch = config.vision_config.patch_size
        states, first = output.hidden_states, self.prefix
        tokens = VisionTokens(
            features=states[config.vision_feature_layer][:, first:],
            projected=torch.stack(list(output.pooler_output)),
            grids=((pixel_values.shape[-2] // patch, pixel_values.shape[-1] // patch),),
            seeds=tuple(map(seed_of, pixel_values)),
            projector=self.projector,
            query_key=partial(self.query_key, states),
            has_cls=first > 0,
        )
        rows, columns = tokens.grid
        flops = self.tower_flops([rows * columns])
        return Images([Group(list(range(len(pixel_values))), tokens, flops=flops)])

    @torch.no_grad()
    def query_key(
        self, states: tuple[Tensor, ...], rows: slice | list[int] = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys of the layer whose output the projector gets, given all states."""
        layer = self.model.config.vision_feature_layer
        before = (layer if layer >= 0 else len(states) + layer) - 1
        return encoder_query_key(self.tower_layers[before], states[before][rows])

    @property
    def projector(self) -> Projector:
        module = self.model.model.multi_modal_projector
        return Projector(module.linear_1, module.act, module.linear_2)
