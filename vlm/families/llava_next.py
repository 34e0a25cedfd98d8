"""LLaVA-NeXT in transformers: LLaVA over an overview and tiles of each image (AnyRes).

An image's tokens are those of the overview and of the tiles, stitched together and unpadded, with
a newline token behind each row. Newlines show nothing, so pruners do not see them: they are kept
when all other tokens are, and are otherwise the first to go.

The tower sees one tile at a time: a token's attention is that of its own tile's tokens, and each
tile has its own CLS token.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlm_prune.vlm.encoded import Group, Images
from vlm_prune.vlm.families.base import Kind, Need, patched, seed_of
from vlm_prune.vlm.families.llava import Llava
from vlm_prune.vlm.layout import alike
from vlm_prune.vlm.smaller import GridOf, Smaller
from vlm_prune.vlm.tokens import VisionTokens

Packing = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class LlavaNext(Llava):
    """Paths into a `LlavaNextForConditionalGeneration`."""

    lacks: ClassVar[frozenset[Need]] = frozenset(
        {"a fixed image size", "a tower that takes smaller images"}
    )
    image_inputs: ClassVar[tuple[str, ...]] = ("image_sizes",)

    def tiles(self, inputs: Mapping[str, Any]) -> list[int]:
        """Returns the number of tiles of each image, the overview among them."""
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        config = self.model.config
        side = config.vision_config.image_size
        return [
            image_size_to_num_patches(size, config.image_grid_pinpoints, side)
            for size in inputs["image_sizes"]
        ]

    def pack(self, size: Tensor, values: Tensor, newline: Tensor | None) -> Tensor:
        """Returns the tiles of one image stitched together, (n, c), as the model does.

        Args:
            size: height and width of the image.
            values: of the tiles, (T, S, c).
            newline: the token behind each row, (c,); None for none.
        """
        packed, _ = self.model.model.pack_image_features(
            [values],
            [size],
            vision_feature_select_strategy=self.model.config.vision_feature_select_strategy,
            image_newline=newline,
        )
        tokens: Tensor = packed[0]
        return tokens

    def is_newline(self, packing: Packing, tiles: int) -> Tensor:
        """Returns which placeholders of an image of that many tiles are
        newlines, (n,), on the host.
        """
        # the model's own stitching of zeros, with a newline that is 1
        patches = torch.zeros(tiles, self.tokens_per_image, 1)
        return packing(patches, patches.new_ones(1))[:, 0] > 0

    def sizes(self, input_ids: Tensor, inputs: Mapping[str, Any]) -> list[int]:
        packings = [partial(self.pack, size) for size in inputs["image_sizes"]]
        return [
            len(self.is_newline(p, t)) for p, t in zip(packings, self.tiles(inputs), strict=True)
        ]

    def smaller(
        self, kind: Kind, pixel_values: Tensor, inputs: Mapping[str, Any], grid_of: GridOf
    ) -> Smaller | None:
        """Returns None: how many tiles there are is decided by the processor.

        Args:
            kind: image.
            pixel_values: of the tiles.
            inputs: of the images.
            grid_of: says how many tokens each is to have.
        """
        return None

    def images(self, output: Any, pixel_values: Tensor, **inputs: Tensor) -> Images:
        """Returns the encoded images of (M, T, 3, H, W) tiles, padded to the longest image.

        Bilinear shrinking, where the model does it, is applied to features and attention alike.
        """
        tiles, sizes = self.tiles(inputs), inputs["image_sizes"]
        layer = self.features(output.hidden_states).split(tiles)
        starts = [sum(tiles[:image]) for image in range(len(tiles))]
        groups = []
        for members in alike([(*map(int, s), t) for s, t in zip(sizes, tiles, strict=True)]):
            count = tiles[members[0]]
            packing = partial(self.pack, sizes[members[0]])
            # tiles of these images among all tiles of the prompt
            rows = [starts[i] + t for i in members for t in range(count)]
            newline = self.is_newline(packing, count).to(output.pooler_output[0].device)
            whole = torch.stack([output.pooler_output[i] for i in members])

            pool = partial(self.pool, packing, count)
            tokens = VisionTokens(
                features=pool(torch.cat([layer[i] for i in members])),
                projected=whole[:, ~newline],
                grids=self.grids(newline, count),
                seeds=tuple(seed_of(pixel_values[i, :count]) for i in members),
                projector=self.projector,
                query_key=partial(self.tower_query_key, output, rows),
                has_cls=self.tower_prefix > 0,
                pool=pool,
                available=len(newline),
                patches=partial(
                    self.packed_patches, pool, [pixel_values[i, :count] for i in members]
                ),
            )
            indices = (~newline).nonzero()[:, 0]
            flops = self.tower_flops([self.tokens_per_image] * count)
            groups.append(Group(members, tokens, indices, whole[:, newline], flops=flops))
        return Images(groups)

    def pool(self, packing: Packing, tiles: int, values: Tensor) -> Tensor:
        """Returns values of tokens, (M, N, c), newlines left out.

        Args:
            packing: how the images' tiles are stitched.
            tiles: of each image, T.
            values: of the tiles, (M T, S, c).
        """
        return torch.stack([packing(image_values, None) for image_values in values.split(tiles)])

    def packed_patches(self, pool: Callable[[Tensor], Tensor], tiles: list[Tensor]) -> Tensor:
        """Returns the pixels behind tokens, (M, N, p), interpolated where features are.

        Args:
            pool: from values of the tiles' patches to those of tokens.
            tiles: of each image, (T, 3, H, W).
        """
        side = int(self.model.config.vision_config.patch_size)
        return pool(patched(torch.cat(tiles), side))

    def grids(self, newline: Tensor, tiles: int) -> tuple[tuple[int, int], ...]:
        """Returns the grids of the overview, and of the tiles where there are some.

        Of the tiles of a very flat image unpadding leaves no row.
        """
        side = round(self.tokens_per_image**0.5)
        rows = int(newline.sum())
        if tiles == 1 or not rows:
            return ((side, side),)
        # each row of the tiles' grid ends with a newline
        return (side, side), (rows, (len(newline) - rows - side**2) // rows)

    def video_tokens(
        self, output: Any, pixel_values: Tensor, features: Tensor, projected: Tensor
    ) -> VisionTokens:
        """Returns the tokens of videos, whose frames are views of one tile each that the model shrinks.

        Args:
            output: of `run`.
            pixel_values: frames, (M, T, 3, H, W).
            features: what the projector reads of them, (M, N, d_v).
            projected: what it makes of that, (M, N, d_l).
        """
        count, frames = pixel_values.shape[:2]
        (_, rows, columns) = self.video_grids({"pixel_values_videos": pixel_values})[0]
        patches = self.patches_of(pixel_values)
        return VisionTokens(
            features=features,
            projected=projected,
            grids=((rows, columns),) * frames,
            seeds=tuple(map(seed_of, pixel_values)),
            projector=self.projector,
            query_key=partial(self.tower_query_key, output),
            has_cls=self.tower_prefix > 0,
            pool=partial(self.shrunk_frames, patches),
            frames=frames,
            patches=lambda: self.shrunk(
                count, patches, patched(pixel_values.flatten(0, 1), self.patch_size)
            ),
            frames_query_key=partial(self.tower_query_key, output),
        )

    def patches_of(self, pixel_values: Tensor) -> tuple[int, int]:
        """Returns rows and columns of patches of views (..., H, W)."""
        rows, columns = (edge // self.patch_size for edge in pixel_values.shape[-2:])
        return rows, columns

    def shrunk(self, videos: int, patches: tuple[int, int], values: Tensor) -> Tensor:
        """Returns values of tokens, given those of frames, (M T, S, c) -> (M, N, c).

        Args:
            videos: their number, M.
            patches: rows and columns of a frame's patches.
            values: of the frames' patches.
        """
        tokens: Tensor = self.shrunk_frames(patches, values).unflatten(0, (videos, -1))
        return tokens.flatten(1, 2)

    def shrunk_frames(self, patches: tuple[int, int], values: Tensor) -> Tensor:
        """Returns the same frame by frame, (F, S, c) -> (F, n, c)."""
        # (F, S, c) -> (F, c, rows, columns), pooled, and back
        pooled = self.pooled(values.transpose(1, 2).unflatten(2, patches))
        tokens: Tensor = pooled.flatten(2).transpose(1, 2)
        return tokens

    def pooled(self, grid: Tensor) -> Tensor:
        """Shrinks the grids of frames (M T, c, rows, columns) as the model does.

        Raises:
            NotImplementedError: in a family that takes no videos.
        """
        raise NotImplementedError

    def video_output(self, output: Any) -> Any:
        """Returns videos of equal length as one tensor."""
        output.pooler_output = torch.stack(output.pooler_output)
        return output
