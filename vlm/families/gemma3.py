"""Gemma 3 in transformers: 256 tokens for each image, which attend to each other both ways.

A SigLIP tower's patches are averaged to tokens, and the projector is a norm and one matrix: the norm
makes it nonlinear, so features are what the norm reads. Both kinds of decoder layers, of full
attention and with a sliding window, turn by frequencies of their own; the window counts tokens that
are kept. Where methods read what image tokens attend to in such a layer (`fastv`), the window ends
where that of the image's last token does.

With pan and scan the processor adds crops to an image, each behind its own marker. Nothing in a
prompt says to which image they belong: a crop is an image of its own, with a budget of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlm_prune.vlm.encoded import Group, Images
from vlm_prune.vlm.families.base import Family, Need, image_blocks, loaded, patched, seed_of
from vlm_prune.vlm.tokens import VisionTokens


@dataclass(frozen=True)
class Gemma3(Family):
    """Paths into a `Gemma3ForConditionalGeneration`."""

    lacks: ClassVar[frozenset[Need]] = frozenset(
        {"a two-layer projector", "a tower that takes smaller images"}
    )
    by_row: ClassVar[bool] = True
    both_ways: ClassVar[tuple[str, ...]] = ("full_attention", "sliding_attention")

    @property
    def tokens_per_image(self) -> int:
        return int(self.model.config.mm_tokens_per_image)

    @property
    def view_tower(self) -> nn.Module:
        tower: nn.Module = self.model.model.vision_tower
        return tower

    @property
    def tower_layers(self) -> Any:
        tower = self.model.model.vision_tower
        return getattr(tower, "vision_model", tower).encoder.layers

    def projector(self, features: Tensor) -> Tensor:
        """Applies the projector's norm and matrix, (..., d_v) -> (..., d_l)."""
        module = self.model.model.multi_modal_projector
        with loaded(module):
            normed = module.mm_soft_emb_norm(features)
            projected: Tensor = torch.matmul(normed, module.mm_input_projection_weight)
        return projected.type_as(features)

    def pool(self, values: Tensor) -> Tensor:
        """Returns the mean over a token's patches, (M, S, c) -> (M, N, c)."""
        side = round(values.shape[1] ** 0.5)
        grid = values.transpose(1, 2).unflatten(2, (side, side))
        pooled: Tensor = self.model.model.multi_modal_projector.avg_pool(grid)
        return pooled.flatten(2).transpose(1, 2)

    @property
    def scored_layer(self) -> int:
        return -1

    def images(self, output: Any, pixel_values: Tensor, **inputs: Tensor) -> Images:
        """Returns the encoded images of (M, 3, H, W) pixels, all of one group."""
        side = round(self.tokens_per_image**0.5)
        tokens = VisionTokens(
            features=self.pool(output.last_hidden_state),
            projected=torch.stack(list(output.pooler_output)),
            grids=((side, side),),
            seeds=tuple(map(seed_of, pixel_values)),
            projector=self.projector,
            query_key=partial(self.tower_query_key, output),
            has_cls=False,
            pool=self.pool,
            patches=partial(patched, pixel_values, pixel_values.shape[-1] // side),
        )
        flops = self.tower_flops([output.last_hidden_state.shape[1]])
        return Images([Group(list(range(len(pixel_values))), tokens, flops=flops)])

    def arguments(
        self, input_ids: Tensor, valid: Tensor, inputs: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        return {"token_type_ids": (input_ids == self.image_token).to(input_ids)}

    def blocks(self, inputs: Mapping[str, Any], length: int) -> Tensor | None:
        kinds = inputs.get("token_type_ids")
        if kinds is None:
            return None
        return image_blocks(kinds == 1, length)

    def output(
        self, features: Sequence[Tensor], deepstack: Sequence[list[Tensor]] = ()
    ) -> dict[str, Any]:
        return {"image": BaseModelOutputWithPooling(pooler_output=torch.stack(list(features)))}
