"""Mistral 3 in transformers: a Pixtral tower, images of any size, 2 x 2 patches per token, rows of text.

Behind each row of an image's tokens stands a token of text that ends it, but for the last row: it goes
when the row's last image token goes, and stays outside of budgets. Norm and merger of the projector
count as the tower's, so that two layers remain. A token receives the mean attention of its patches in
the tower's last layer; there is no CLS token.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.encoded import Group, Images
from vlm_prune.vlm.families.base import Family, Need, noted, patched, seed_of
from vlm_prune.vlm.layout import alike
from vlm_prune.vlm.projector import Projector
from vlm_prune.vlm.tokens import VisionTokens


@dataclass(frozen=True)
class Mistral3(Family):
    """Paths into a `Mistral3ForConditionalGeneration`."""

    lacks: ClassVar[frozenset[Need]] = frozenset(
        {"a fixed image size", "a tower that takes smaller images"}
    )
    image_inputs: ClassVar[tuple[str, ...]] = ("image_sizes",)
    row_breaks: ClassVar[bool] = True

    @property
    def tower_layers(self) -> Any:
        return self.model.model.vision_tower.transformer.layers

    @property
    def tokens_per_image(self) -> int:
        raise InputError("images of this model have as many tokens as their size asks for")

    @property
    def merge(self) -> int:
        """Returns how many patches a token has on each side."""
        return int(self.model.config.spatial_merge_size)

    @property
    def projector(self) -> Projector:
        module = self.model.model.multi_modal_projector
        return Projector(module.linear_1, module.act, module.linear_2)

    def check_size(self, image_processor: Any, width: int, height: int) -> None:
        """Refuses a picture of a single token, beside others too.

        transformers 5.24 drops the axis of the tokens where a forward's images have one token in all.

        Args:
            image_processor: of the model; it never enlarges a picture.
            width: of the picture in pixels.
            height: of the picture in pixels.

        Raises:
            InputError: if neither side is longer than a token's.
        """
        side = self.patch_size * self.merge
        if max(width, height) <= side:
            raise InputError(
                f"an image of {width} x {height} is a single token of this model, which transformers "
                f"cannot encode alone; scale it beyond {side} pixels"
            )

    def grids(self, image_sizes: Any) -> list[tuple[int, int]]:
        """Returns rows and columns of tokens of each image, given heights and widths in pixels."""
        side = self.patch_size * self.merge
        return [(int(height) // side, int(width) // side) for height, width in image_sizes]

    def sizes(self, input_ids: Tensor, inputs: Mapping[str, Any]) -> list[int]:
        return [rows * columns for rows, columns in self.grids(inputs["image_sizes"])]

    def run(self, encoder: Callable[..., Any], pixel_values: Tensor, **inputs: Any) -> Any:
        """Runs the tower as `Family.run`, and adds what its last layer and the
        projector's first layer get.

        `last_layer` is the last layer's input and rotation, `merged` the first layer's input.
        """
        first = self.model.model.multi_modal_projector.linear_1
        with noted(self.tower_layers[-1]) as seen, noted(first) as merged:
            output = super().run(encoder, pixel_values, **inputs)
        output.last_layer, output.merged = seen, merged["hidden_states"]
        return output

    def images(self, output: Any, pixel_values: Tensor, **inputs: Tensor) -> Images:
        """Returns the encoded images of (M, 3, H, W) pixels, padded to the largest,
        whose sizes are `image_sizes` (M, 2).
        """
        sizes = inputs["image_sizes"]
        grids, merge = self.grids(sizes), self.merge
        counts = [rows * columns for rows, columns in grids]
        features = output.merged.split(counts)
        # the tower's one sequence holds all images, one after the other
        patches = [count * merge**2 for count in counts]
        hidden_states = output.last_layer["hidden_states"].squeeze(0).split(patches)
        cos, sin = (table.split(patches) for table in output.last_layer["rotary"])
        groups = []
        for members in alike(grids):
            first = members[0]
            before = torch.stack([hidden_states[i] for i in members])
            tokens = VisionTokens(
                features=torch.stack([features[i] for i in members]),
                projected=torch.stack([output.pooler_output[i] for i in members]),
                grids=(grids[first],),
                seeds=tuple(
                    seed_of(pixel_values[i, :, : int(sizes[i][0]), : int(sizes[i][1])])
                    for i in members
                ),
                projector=self.projector,
                query_key=partial(self.query_key, before, cos[first], sin[first]),
                has_cls=False,
                pool=partial(self.pool, grids[first]),
                patches=partial(self.token_pixels, pixel_values[members], grids[first]),
            )
            groups.append(Group(members, tokens, flops=self.tower_flops([patches[first]])))
        return Images(groups, {"image_sizes": sizes})

    def token_pixels(self, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        """Returns the pixels behind the tokens of padded images
        (M, 3, H, W) of one grid, (M, N, p).
        """
        side, (rows, columns) = self.patch_size * self.merge, grid
        return patched(pixels[..., : rows * side, : columns * side], side)

    def pool(self, grid: tuple[int, int], values: Tensor) -> Tensor:
        """Returns the mean over a token's patches, (M, S, c) ->
        (M, N, c), given the grid of tokens.
        """
        merge, (rows, columns) = self.merge, grid
        mean: Tensor = values.unflatten(1, (rows, merge, columns, merge)).mean((2, 4))
        return mean.flatten(1, 2)

    @torch.no_grad()
    def query_key(self, hidden_states: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Returns queries and keys of the last layer, after rotation.

        Args:
            hidden_states: its input, (M, S, d).
            cos: of the rotation, (S, d).
            sin: of the rotation, (S, d).
        """
        from transformers.models.pixtral.modeling_pixtral import apply_rotary_pos_emb

        layer = self.tower_layers[-1]
        attention, normed = layer.attention, layer.attention_norm(hidden_states)
        query, key = (
            project(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, cos, sin, unsqueeze_dim=0)
        return query, key
