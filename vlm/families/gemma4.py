"""Gemma 4 in transformers: images of any shape, 3 x 3 patches per token, and a decoder that shares.

Patches are averaged to tokens, and the projector is a norm and one matrix: the norm makes it nonlinear,
so features are what the norm reads. In the larger models an image's tokens attend to each other both
ways, in layers with a sliding window alone. Layers also get an embedding of each token's id, which goes
with its token, and in the smaller models the last ones use keys and values of two layers before, behind
which nothing is dropped. `generate` asks those last layers for the last token alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.cost import tower_flops
from vlm_prune.vlm.encoded import Group, Images
from vlm_prune.vlm.families.base import Family, Need, image_blocks, matrices, noted, seed_of
from vlm_prune.vlm.layout import alike
from vlm_prune.vlm.tokens import VisionTokens


@dataclass(frozen=True)
class Gemma4(Family):
    """Paths into a `Gemma4ForConditionalGeneration`."""

    lacks: ClassVar[frozenset[Need]] = frozenset(
        {
            "a fixed image size",
            "a tower that takes smaller images",
            "a two-layer projector",
            "decoder layers with keys and values, and no inputs but hidden states, of their own",
        }
    )
    image_inputs: ClassVar[tuple[str, ...]] = ("image_position_ids",)
    by_row: ClassVar[bool] = True
    both_ways: ClassVar[tuple[str, ...]] = ("sliding_attention",)

    @property
    def tower_layers(self) -> Any:
        return self.model.model.vision_tower.encoder.layers

    @property
    def tokens_per_image(self) -> int:
        raise InputError("images of this model have as many tokens as their shape asks for")

    @property
    def last_cut(self) -> int:
        """Returns how many layers can have run at a cut: the last ones use keys
        and values of layers before.

        These must have been cut by then.
        """
        layers = self.decoder.layers
        if not any(layer.self_attn.is_kv_shared_layer for layer in layers):
            return super().last_cut
        return min(n for n, layer in enumerate(layers) if layer.self_attn.store_full_length_kv)

    @property
    def side(self) -> int:
        """Returns how many patches a token has on each side."""
        return int(self.model.config.vision_config.pooling_kernel_size)

    @property
    def projector(self) -> Callable[[Tensor], Tensor]:
        module: Callable[[Tensor], Tensor] = self.model.model.embed_vision
        return module

    def grids(self, positions: Tensor) -> list[tuple[int, int]]:
        """Returns rows and columns of tokens of each image, given its patches'
        columns and rows, (M, P, 2).
        """
        # the last patch tells the size; padding has positions of -1
        sizes = (positions.amax(1) + 1).div(self.side, rounding_mode="floor").tolist()
        return [(rows, columns) for columns, rows in sizes]

    def sizes(self, input_ids: Tensor, inputs: Mapping[str, Any]) -> list[int]:
        return [rows * columns for rows, columns in self.grids(inputs["image_position_ids"])]

    def run(self, encoder: Callable[..., Any], pixel_values: Tensor, **inputs: Any) -> Any:
        """Runs the tower as `Family.run`, and adds what its last layer gets, input
        and rotation, as `last_layer`.
        """
        moved = {
            name: value.to(self.device)
            for name, value in inputs.items()
            if name in self.image_inputs
        }
        with noted(self.tower_layers[-1]) as seen:
            output = encoder(pixel_values, **inputs | moved | {"return_dict": True})
        output.last_layer = seen
        return output

    def images(self, output: Any, pixel_values: Tensor, **inputs: Tensor) -> Images:
        """Returns the encoded images of flattened patches (M, P, c), padded, at
        `image_position_ids` (M, P, 2).
        """
        positions = inputs["image_position_ids"].to(self.device)
        grids, hidden_states = self.grids(positions), output.last_layer["hidden_states"]
        counts = [rows * columns for rows, columns in grids]
        features, flops = (
            output.last_hidden_state.split(counts),
            self.padded_flops(hidden_states.shape[1]),
        )
        groups = []
        for members in alike(grids):
            first = members[0]
            # an image's patches come before its padding
            patches = slice(counts[first] * self.side**2)
            cos, sin = (table[first, patches] for table in output.last_layer["rotary"])
            visible = torch.stack([hidden_states[i, patches] for i in members])
            tokens = VisionTokens(
                features=torch.stack([features[i] for i in members]),
                projected=torch.stack([output.pooler_output[i] for i in members]),
                grids=(grids[first],),
                seeds=tuple(seed_of(pixel_values[i, patches]) for i in members),
                projector=self.projector,
                query_key=partial(self.query_key, visible, cos, sin, positions[first, patches]),
                has_cls=False,
                pool=partial(self.pool, grids[first]),
                patches=partial(self.token_pixels, grids[first], pixel_values[members, patches]),
            )
            groups.append(Group(members, tokens, flops=flops))
        return Images(groups, {"image_position_ids": positions})

    def padded_flops(self, patches: int) -> float:
        """Returns the matrix-product FLOPs of the tower on an image padded to
        `patches`, pooling included.
        """
        vision, tower = self.model.config.vision_config, self.model.model.vision_tower
        width = vision.num_attention_heads * vision.head_dim
        layers = [(matrices(layer), [patches]) for layer in self.tower_layers]
        embedding = matrices(tower.patch_embedder.input_proj)
        pooling = 2.0 * patches * (patches // self.side**2) * int(vision.hidden_size)
        return tower_flops(width, patches, embedding, layers) + pooling

    def token_pixels(self, grid: tuple[int, int], patches: Tensor) -> Tensor:
        """Returns the pixels behind tokens, (M, N, p), of patches
        (M, S, c), given the grid of tokens.
        """
        side, (rows, columns) = self.side, grid
        # patches in reading order -> (M, rows, columns, side, side, c)
        pixels: Tensor = patches.unflatten(1, (rows, side, columns, side)).transpose(2, 3)
        return pixels.flatten(3).flatten(1, 2)

    def pool(self, grid: tuple[int, int], values: Tensor) -> Tensor:
        """Returns the mean over a token's patches, (M, S, c) ->
        (M, N, c), given the grid of tokens.
        """
        side, (rows, columns) = self.side, grid
        mean: Tensor = values.unflatten(1, (rows, side, columns, side)).mean((2, 4))
        return mean.flatten(1, 2)

    @torch.no_grad()
    def query_key(
        self, hidden_states: Tensor, cos: Tensor, sin: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns queries and keys of the last layer, after rotation.

        Args:
            hidden_states: its input, (M, S, d).
            cos: of the rotation, (S, d).
            sin: of the rotation, (S, d).
            positions: columns and rows of the patches, (S, 2).
        """
        from transformers.models.gemma4.modeling_gemma4 import apply_multidimensional_rope

        layer = self.tower_layers[-1]
        attention, normed = layer.self_attn, layer.input_layernorm(hidden_states)
        query, key = (
            apply_multidimensional_rope(
                norm(project(normed).unflatten(-1, (-1, attention.head_dim))),
                cos[None], sin[None], positions[None],
            ).transpose(1, 2)
            for project, norm in (
                (attention.q_proj, attention.q_norm), (attention.k_proj, attention.k_norm)
            )
        )  # fmt: skip
        # attention multiplies with no scale, and methods with that of the width
        query = query * (attention.scaling * attention.head_dim**0.5)
        return query, key.repeat_interleave(attention.num_key_value_groups, 1)

    def arguments(
        self, input_ids: Tensor, valid: Tensor, inputs: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        return {"mm_token_type_ids": (input_ids == self.image_token).to(input_ids)}

    def blocks(self, inputs: Mapping[str, Any], length: int) -> Tensor | None:
        kinds = inputs.get("mm_token_type_ids")
        if kinds is None or self.decoder.config.use_bidirectional_attention != "vision":
            return None
        return image_blocks((kinds == 1) | (kinds == 2), length)
