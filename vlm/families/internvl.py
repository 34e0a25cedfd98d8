"""InternVL in transformers (the `-hf` checkpoints): tiles of 2 x 2 patches per token, with a CLS.

An image is one run of placeholders: its tiles and then its overview. The projector's norm counts
as the tower's, so that two layers remain. A token's attention is the mean over its patches, within
its tile; each tile has its own CLS token.

Frames of a video are images of one tile, `Frame1: <img>...</img>` and a newline each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlm_prune.vlm.attention import in_heads
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.encoded import Images
from vlm_prune.vlm.families.base import check_strategy
from vlm_prune.vlm.families.tiled import Tiled
from vlm_prune.vlm.layout import image_runs
from vlm_prune.vlm.projector import Projector


@dataclass(frozen=True)
class InternVL(Tiled):
    """Paths into an `InternVLForConditionalGeneration`."""

    frames_as_images: ClassVar[bool] = True
    separators: ClassVar[int] = 1

    def __post_init__(self) -> None:
        layer = self.model.config.vision_feature_layer
        if not isinstance(layer, int):
            raise InputError(
                f"vision_feature_layer {layer} is none that InternVL has; give a number"
            )
        check_strategy(self.model.config, self.tower_prefix)

    @property
    def view_tower(self) -> nn.Module:
        tower: nn.Module = self.model.model.vision_tower
        return tower

    @property
    def tower_layers(self) -> Any:
        return self.model.model.vision_tower.encoder.layer

    @property
    def tower_prefix(self) -> int:
        """Returns 1: the tower always has a CLS token."""
        return 1

    @property
    def tokens_per_image(self) -> int:
        patches = self.model.model.vision_tower.embeddings.patch_embeddings.num_patches
        return int(patches * self.model.config.downsample_ratio**2)

    @property
    def projector(self) -> Projector:
        module = self.model.model.multi_modal_projector
        return Projector(module.linear_1, module.act, module.linear_2)

    def sizes(self, input_ids: Tensor, inputs: Mapping[str, Any]) -> list[int]:
        return [length for _, _, length in image_runs(input_ids == self.image_token)]

    def patches(self, values: Tensor) -> Tensor:
        grid = values.unflatten(1, (round(values.shape[1] ** 0.5), -1))
        ratio = self.model.config.downsample_ratio
        shuffled: Tensor = self.model.model.pixel_shuffle(grid.contiguous(), ratio)
        return shuffled.flatten(1, 2)

    @property
    def states_read(self) -> tuple[int, ...]:
        return (int(self.model.config.vision_feature_layer),)

    @property
    def scored_layer(self) -> int:
        """Returns the number of the tower's layer whose output the projector gets."""
        layer = int(self.model.config.vision_feature_layer)
        return (layer if layer >= 0 else len(self.tower_layers) + 1 + layer) - 1

    def images(self, output: Any, pixel_values: Tensor, **inputs: Tensor) -> Images:
        """Returns the encoded images of (T, 3, H, W) tiles; needs `input_ids`."""
        config, model = self.model.config, self.model.model
        states, layer = output.hidden_states, config.vision_feature_layer
        first = self.tower_prefix
        last = output.last_hidden_state if layer == -1 else states[layer]
        features = model.multi_modal_projector.layer_norm(self.patches(last[:, first:]))
        projected = output.pooler_output
        return self.grouped(
            inputs,
            pixel_values,
            features,
            projected,
            partial(self.tower_query_key, output),
            first > 0,
        )

    @torch.no_grad()
    def tower_query_key(
        self, output: Any, rows: slice | list[int] = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """Returns queries and keys (T, H, S, d) of the scored layer for some
        tiles, given what `run` returned.
        """
        layer = self.tower_layers[self.scored_layer]
        attention = layer.attention
        if output.projections is None:
            normed = layer.layernorm_before(output.hidden_states[self.scored_layer][rows])
            query, key = attention.q_proj(normed), attention.k_proj(normed)
        else:
            query, key = (seen[rows] for seen in output.projections)
        width = attention.head_dim
        return in_heads(attention.q_norm(query), width), in_heads(attention.k_norm(key), width)

    def output(
        self, features: Sequence[Tensor], deepstack: Sequence[list[Tensor]] = ()
    ) -> dict[str, Any]:
        """Returns images as one tensor, whose first dimension beam search can cut anywhere."""
        together = torch.cat(list(features))[:, None]
        return {"image": BaseModelOutputWithPooling(pooler_output=together)}
