"""Qwen2.5-VL in transformers: images of any size, 2 x 2 patches per token, three-row positions.

The tower makes one frame of each two of a video, and sees those apart. A video is one run of
placeholders; the time between its frames, `second_per_grid_ts`, is in the positions alone.

The projector is the merger: its norm counts as the tower's, so that two layers remain, and its
features are the four patches of a token side by side. A token receives the mean attention of its
patches in the tower's last layer, which sees the whole image in every released checkpoint; where a
config makes it windowed, attention is read as if it were not. There is no CLS token: methods that
read its attention read the mean over all patches.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.vision_utils import get_vision_window_index

from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.cost import tower_flops
from vlm_prune.vlm.encoded import Group, Images
from vlm_prune.vlm.families.base import (
    KINDS,
    Family,
    Kind,
    Need,
    matrices,
    noted,
    outputs_of,
    seed_of,
)
from vlm_prune.vlm.layout import alike
from vlm_prune.vlm.projector import Projector
from vlm_prune.vlm.smaller import GridOf, Smaller, places_of, resized
from vlm_prune.vlm.tokens import VisionTokens, rows_at


@dataclass(frozen=True)
class Qwen25VL(Family):
    """Paths into a `Qwen2_5_VLForConditionalGeneration`."""

    lacks: ClassVar[frozenset[Need]] = frozenset({"a fixed image size"})
    kinds: ClassVar[tuple[Kind, ...]] = KINDS
    image_inputs: ClassVar[tuple[str, ...]] = ("image_grid_thw",)
    video_inputs: ClassVar[tuple[str, ...]] = ("video_grid_thw",)
    mrope: ClassVar[bool] = True

    @property
    def tower(self) -> Any:
        """Returns the vision tower."""
        return self.model.model.visual

    @property
    def tower_layers(self) -> Any:
        return self.tower.blocks

    @property
    def merged(self) -> int:
        """Returns how many patches a token has."""
        return int(self.tower.spatial_merge_size) ** 2

    @property
    def tokens_per_image(self) -> int:
        raise InputError("images of this model have as many tokens as their size asks for")

    @property
    def projector(self) -> Projector:
        return Projector(*self.tower.merger.mlp)

    def normed(self, hidden_states: Tensor) -> Tensor:
        """Returns what the projector reads of the last layer's output, (P, d_v) -> (P, d_v)."""
        normed: Tensor = self.tower.merger.ln_q(hidden_states)
        return normed

    def features(self, output: Any, grid: Tensor) -> Tensor:
        """Returns what the projector's first layer reads of each
        token, (N, d_v), in reading order.
        """
        return self.in_rows(self.normed(output.last_hidden_state), grid).flatten(1)

    def in_rows(self, values: Tensor, grid: Tensor) -> Tensor:
        """Undoes the tower's order: tokens in reading order, (P, ...) -> (P / 4, 4, ...)."""
        # the tower's n-th token is number order[n] in reading order; the inverse undoes that
        order, _ = self.windows(grid)
        tokens: Tensor = values.unflatten(0, (-1, self.merged))
        return tokens[order.argsort().to(values.device)]

    def run(self, encoder: Callable[..., Any], pixel_values: Tensor, **inputs: Any) -> Any:
        """Runs the tower, and adds queries and keys of its last layer and
        their rotation to the output.

        `query_key` is as the layer computed them, side by side and before rotation, (P, 2 H d);
        `rotary` is the rotation.
        """
        moved = {n: inputs[n].to(self.device) for n in inputs if n.endswith("_grid_thw")}
        layer = self.tower_layers[-1]
        with noted(layer) as seen, outputs_of(layer.attn.qkv) as projections:
            output = encoder(pixel_values, **inputs | moved | {"return_dict": True})
        joint = projections[0]
        if joint is None:
            with torch.no_grad():
                joint = layer.attn.qkv(layer.norm1(seen["hidden_states"]))
        # (P, 3 H d): queries, keys and values side by side
        output.query_key, output.rotary = joint[:, : joint.shape[1] // 3 * 2], seen["rotary"]
        return output

    def smaller(
        self, kind: Kind, pixel_values: Tensor, inputs: Mapping[str, Any], grid_of: GridOf
    ) -> Smaller | None:
        """Returns smaller images or videos, given flattened patches (P, c).

        Args:
            kind: what they are.
            pixel_values: of all of them.
            inputs: with their grids.
            grid_of: says how many tokens each is to have.
        """
        name, side = f"{kind}_grid_thw", int(self.tower.spatial_merge_size)
        wholes = inputs[name].tolist()
        grids, pixels, places, counts = [], [], [], []
        patches = pixel_values.split([math.prod(grid) for grid in wholes])
        for whole, own in zip(wholes, patches, strict=True):
            frames, rows, columns = whole[0], whole[1] // side, whole[2] // side
            counts.append(frames * rows * columns)
            small = grid_of(rows, columns, frames if kind == "video" else 0, counts[-1])
            grids.append([frames, small[0] * side, small[1] * side])
            pixels.append(own if grids[-1] == whole else self.resampled(own, whole, grids[-1]))
            places.append(places_of(small, (rows, columns), frames).to(self.device))
        if grids == wholes:
            return None
        return Smaller(torch.cat(pixels), {name: inputs[name].new_tensor(grids)}, places, counts)

    def resampled(self, patches: Tensor, whole: list[int], small: list[int]) -> Tensor:
        """Returns flattened patches (P, c) of an image or video of another size.

        Args:
            patches: as the processor gives them.
            whole: its frames, rows and columns of patches.
            small: those that it is to have.
        """
        side, edge, (frames, rows, columns) = (
            int(self.tower.spatial_merge_size), self.patch_size, whole
        )  # fmt: skip
        # patches lie token by token: (T, rows, columns, side, side, channels, edge, edge)
        tokens = patches.reshape(frames, rows // side, columns // side, side, side, -1, edge, edge)
        views = tokens.permute(0, 5, 1, 3, 6, 2, 4, 7).flatten(5).flatten(2, 4)
        _, rows, columns = small
        shrunk = resized(views, rows * edge, columns * edge)
        # and back
        split = shrunk.unflatten(3, (columns // side, side, edge))
        split = split.unflatten(2, (rows // side, side, edge))
        flat: Tensor = split.permute(0, 2, 5, 3, 6, 1, 4, 7).flatten(5).flatten(0, 4)
        return flat

    def images(self, output: Any, pixel_values: Tensor, **inputs: Tensor) -> Images:
        """Returns the encoded images of flattened patches (P, c), of
        grids `image_grid_thw` (M, 3).
        """
        return self.encoded(output, pixel_values, inputs["image_grid_thw"], "image")

    def videos(self, output: Any, pixel_values: Tensor, **inputs: Tensor) -> Images:
        """Returns the encoded videos of flattened patches (P, c), of
        grids `video_grid_thw` (M, 3).
        """
        return self.encoded(output, pixel_values, inputs["video_grid_thw"], "video")

    def video_grids(self, inputs: Mapping[str, Any]) -> list[tuple[int, int, int]]:
        side = self.tower.spatial_merge_size
        grids = inputs["video_grid_thw"].tolist()
        return [(time, rows // side, columns // side) for time, rows, columns in grids]

    def encoded(self, output: Any, pixel_values: Tensor, grid: Tensor, kind: Kind) -> Images:
        """Returns what `images` and `videos` do.

        Args:
            output: of `run`.
            pixel_values: flattened patches (P, c).
            grid: frames, rows and columns of patches, (M, 3).
            kind: what they are.
        """
        grid = grid.to(self.device)
        # patches and tokens of each image
        patches = grid.prod(1).tolist()
        counts = [count // self.merged for count in patches]
        features = self.features(output, grid)
        joint, cos, sin = (
            self.in_rows(value, grid).split(counts) for value in (output.query_key, *output.rotary)
        )
        by_image, pixels = features.split(counts), pixel_values.split(patches)
        deepstack = getattr(output, "deepstack_features", None) or []
        side = self.tower.spatial_merge_size
        groups = []
        for members in alike([tuple(row) for row in grid.tolist()]):
            first = members[0]
            time, rows, columns = grid[first].tolist()
            # frames do not see each other, and all are rotated alike
            rotary = [table[first].flatten(0, 1)[: rows * columns] for table in (cos, sin)]
            before = torch.stack([joint[i].flatten(0, 1) for i in members])
            before = before.unflatten(1, (time, -1)).flatten(0, 1)
            tokens = VisionTokens(
                features=torch.stack([by_image[i] for i in members]),
                projected=torch.stack([output.pooler_output[i] for i in members]),
                grids=((rows // side, columns // side),) * time,
                seeds=tuple(seed_of(pixels[i]) for i in members),
                projector=self.projector,
                query_key=partial(self.query_key, before, *rotary),
                has_cls=False,
                pool=partial(self.pool, 1 if kind == "video" else time),
                frames=time if kind == "video" else 0,
                patches=partial(self.token_pixels, [pixels[i] for i in members]),
                frames_query_key=partial(self.frames_query_key, before, *rotary),
            )
            layers = [torch.stack([layer[i] for i in members]) for layer in deepstack]
            groups.append(
                Group(members, tokens, deepstack=layers, flops=self.grid_flops(grid[first]))
            )
        return Images(groups, {f"{kind}_grid_thw": grid})

    def token_pixels(self, patches: list[Tensor]) -> Tensor:
        """Returns the pixels behind the tokens of images of equally
        many patches (P, c), (M, N, p).
        """
        return torch.stack(
            [image_patches.unflatten(0, (-1, self.merged)).flatten(1) for image_patches in patches]
        )

    def grid_flops(self, grid: Tensor) -> float:
        """Returns the matrix-product FLOPs of the tower on an image of that grid, (3,)."""
        time, rows, columns = grid.tolist()
        layers = [(matrices(layer), [rows * columns] * time) for layer in self.tower_layers]
        whole = getattr(self.tower, "fullatt_block_indexes", range(len(layers)))
        if len(whole) < len(layers):
            windows = self.windows(grid[None])[1].diff().tolist()
            layers = [
                (weights, lengths if number in whole else windows)
                for number, (weights, lengths) in enumerate(layers)
            ]
        width = self.model.config.vision_config.hidden_size
        return tower_flops(width, time * rows * columns, self.patch_embedding, layers)

    def windows(self, grid: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the order of tokens in the tower's windows, (N,), and where
        among patches the windows end.
        """
        order, ends = get_vision_window_index(
            grid, self.tower.spatial_merge_size, self.tower.window_size, self.tower.patch_size
        )
        return order, ends

    def pool(self, frames: int, values: Tensor) -> Tensor:
        """Returns the mean over a token's patches, (M T, S, c) -> (M, N, c)."""
        mean: Tensor = values.unflatten(1, (-1, self.merged)).mean(2)
        whole: Tensor = mean.unflatten(0, (-1, frames))
        return whole.flatten(1, 2)

    @torch.no_grad()
    def query_key(self, joint: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Returns queries and keys of the last layer, after rotation.

        Args:
            joint: queries and keys before it, side by side, (M T, S, 2 H d).
            cos: of the rotation.
            sin: of the rotation.
        """
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

        heads = self.tower_layers[-1].attn.num_heads
        query, key = joint.unflatten(-1, (2, heads, -1)).unbind(2)
        query, key = apply_rotary_pos_emb_vision(query, key, cos, sin)
        return query.transpose(1, 2), key.transpose(1, 2)

    def frames_query_key(
        self, joint: Tensor, cos: Tensor, sin: Tensor, frames: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Returns the same of some frames.

        Args:
            joint: queries and keys before rotation, side by side, (M T, S, 2 H d).
            cos: of the rotation.
            sin: of the rotation.
            frames: which of the M T.
        """
        return self.query_key(joint[rows_at(frames)], cos, sin)

    def sizes(self, input_ids: Tensor, inputs: Mapping[str, Any]) -> list[int]:
        return [int(count) // self.merged for count in inputs["image_grid_thw"].prod(1)]

    def positions(self, input_ids: Tensor, valid: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        spatial, _ = self.model.model.get_rope_index(
            input_ids,
            mm_token_type_ids=(input_ids == self.image_token).int()
            + 2 * (input_ids == self.video_token).int(),
            image_grid_thw=inputs.get("image_grid_thw"),
            video_grid_thw=inputs.get("video_grid_thw"),
            second_per_grid_ts=inputs.get("second_per_grid_ts"),
            attention_mask=valid,
        )
        return torch.cat([(valid.cumsum(1) - 1)[None], spatial])
