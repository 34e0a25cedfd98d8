"""LLaVA-1.5 in transformers: a CLIP or SigLIP tower, a two-layer projector, a Llama-style decoder.

The tower's attention is that of the layer whose output the projector gets, the last but one; where
it gets those of several, side by side, that of the last of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.registry import unknown
from vlm_prune.vlm.encoded import Group, Images
from vlm_prune.vlm.families.base import Family, Kind, check_strategy, loaded, patched, seed_of
from vlm_prune.vlm.projector import Projector
from vlm_prune.vlm.smaller import GridOf, Smaller, places_of, resized
from vlm_prune.vlm.tokens import VisionTokens

TOWERS = ("clip_vision_model", "siglip_vision_model")


@dataclass(frozen=True)
class Llava(Family):
    """Paths into a `LlavaForConditionalGeneration`."""

    def __post_init__(self) -> None:
        kind = self.model.config.vision_config.model_type
        if kind not in TOWERS:
            raise InputError(unknown("vision tower", kind, TOWERS))
        check_strategy(self.model.config, self.tower_prefix)

    @property
    def tokens_per_image(self) -> int:
        vision = self.model.config.vision_config
        return int((vision.image_size // vision.patch_size) ** 2)

    @property
    def view_tower(self) -> nn.Module:
        tower: nn.Module = self.model.model.vision_tower
        return tower

    @property
    def tower_layers(self) -> Any:
        tower = self.model.model.vision_tower
        return getattr(tower, "vision_model", tower).encoder.layers

    @property
    def tower_prefix(self) -> int:
        """Returns 1 for a tower with a CLS token (CLIP), 0 for one without (SigLIP)."""
        tower = self.model.model.vision_tower
        return int(hasattr(getattr(tower, "vision_model", tower).embeddings, "class_embedding"))

    @property
    def feature_states(self) -> tuple[int, ...]:
        """Returns the numbers of the tower's hidden states that the
        projector reads side by side.
        """
        given = self.model.config.vision_feature_layer
        states = len(self.tower_layers) + 1
        return tuple(number % states for number in ([given] if isinstance(given, int) else given))

    @property
    def scored_layer(self) -> int:
        """Returns the number of the tower's layer whose attention methods read,
        the last before the projector.

        Raises:
            InputError: when the projector reads what no layer has seen.
        """
        layer = max(self.feature_states) - 1
        if layer < 0:
            raise InputError("vision_feature_layer 0 is the output of no layer; give one from 1 on")
        return layer

    @property
    def states_read(self) -> tuple[int, ...]:
        return self.feature_states

    def features(self, states: tuple[Tensor, ...]) -> Tensor:
        """Returns what the projector reads of the tower's hidden states, (M, N, d_v)."""
        read = [states[number][:, self.tower_prefix :] for number in self.feature_states]
        return read[0] if len(read) == 1 else torch.cat(read, -1)

    def run(self, encoder: Callable[..., Any], pixel_values: Tensor, **inputs: Any) -> Any:
        """Runs the tower as `Family.run`; sizes other than the trained one
        interpolate the position embeddings.
        """
        size = self.model.config.vision_config.image_size
        pixels = pixel_values.to(self.model.dtype)
        if tuple(pixels.shape[-2:]) == (size, size):
            return super().run(encoder, pixels, **inputs)
        tower = self.model.model.vision_tower
        # a table that is interpolated is read, not called
        with loaded(getattr(tower, "vision_model", tower).embeddings.position_embedding):
            return super().run(encoder, pixels, **inputs | {"interpolate_pos_encoding": True})

    def smaller(
        self, kind: Kind, pixel_values: Tensor, inputs: Mapping[str, Any], grid_of: GridOf
    ) -> Smaller | None:
        """Returns smaller images, given (M, 3, H, W) pixels, whose position embeddings are interpolated.

        Args:
            kind: image.
            pixel_values: of the images.
            inputs: none.
            grid_of: says how many tokens each is to have.
        """
        patch, images = self.patch_size, len(pixel_values)
        rows, columns = (side // patch for side in pixel_values.shape[-2:])
        small = grid_of(rows, columns, 0, rows * columns)
        if small == (rows, columns):
            return None
        pixels = resized(pixel_values, small[0] * patch, small[1] * patch)
        places = places_of(small, (rows, columns)).to(self.device)
        return Smaller(pixels, {}, [places] * images, [rows * columns] * images)

    def images(self, output: Any, pixel_values: Tensor, **inputs: Tensor) -> Images:
        """Returns the encoded images of (M, 3, H, W) pixels, all of one group."""
        config = self.model.config
        patch = config.vision_config.patch_size
        states = output.hidden_states
        tokens = VisionTokens(
            features=self.features(states),
            projected=torch.stack(list(output.pooler_output)),
            grids=((pixel_values.shape[-2] // patch, pixel_values.shape[-1] // patch),),
            seeds=tuple(map(seed_of, pixel_values)),
            projector=self.projector,
            query_key=partial(self.tower_query_key, output),
            has_cls=self.tower_prefix > 0,
            patches=partial(patched, pixel_values, patch),
        )
        rows, columns = tokens.grid
        flops = self.tower_flops([rows * columns])
        return Images([Group(list(range(len(pixel_values))), tokens, flops=flops)])

    @property
    def projector(self) -> Projector:
        module = self.model.model.multi_modal_projector
        return Projector(module.linear_1, module.act, module.linear_2)
