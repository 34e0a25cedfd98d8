"""What families share whose images are tiles of equally many tokens, several patches per token."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.encoded import Group, Images
from vlm_prune.vlm.families.base import Family, Kind, Need, patched, seed_of
from vlm_prune.vlm.layout import REMEDY, alike
from vlm_prune.vlm.tokens import VisionTokens


@dataclass(frozen=True)
class Tiled(Family):
    """Pixels hold tiles alone; which image a tile belongs to is told by the prompt.

    The projector reads the patches of a token side by side. A token receives the mean attention of
    its patches within their tile.
    """

    lacks: ClassVar[frozenset[Need]] = frozenset({"a fixed image size"})

    def counts(
        self, input_ids: Tensor, inputs: Mapping[str, Any], kind: Kind = "image"
    ) -> list[int]:
        if inputs.get("pixel_values") is None and not inputs.get("mm_encoder_outputs"):
            return []
        return self.sizes(input_ids, inputs)

    @abstractmethod
    def patches(self, values: Tensor) -> Tensor:
        """Shuffles patches as the model does, (T, S, c) -> (T, n, f c), f patches per token."""

    def pool(self, tiles: int, values: Tensor) -> Tensor:
        """Returns the mean over a token's patches, (M T, S, c) -> (M, T n, c)."""
        patches = self.patches(values).unflatten(-1, (-1, values.shape[-1])).mean(2)
        pooled: Tensor = patches.unflatten(0, (-1, tiles)).flatten(1, 2)
        return pooled

    def tile_patches(self, tiles: list[Tensor]) -> Tensor:
        """Returns the pixels behind the tokens of images of equally many
        tiles (T, 3, H, W), (M, N, p).
        """
        values = self.patches(patched(torch.cat(tiles), self.patch_size))
        patches: Tensor = values.unflatten(0, (len(tiles), -1)).flatten(1, 2)
        return patches

    def grouped(
        self,
        inputs: Mapping[str, Tensor],
        pixels: Tensor,
        features: Tensor,
        projected: Tensor,
        query_key: Callable[[list[int]], tuple[Tensor, Tensor]],
        has_cls: bool,
    ) -> Images:
        """Returns what the tower says about tiles, grouped by the prompt's images.

        Args:
            inputs: of the prompt, `input_ids` among them.
            pixels: of the tiles, (T, 3, H, W).
            features: of the tower, (T, n, ...).
            projected: of the projector, (T, n, D).
            query_key: queries and keys of the tower's last layer, for given tiles.
            has_cls: whether the tower puts a CLS token in front.

        Raises:
            InputError: when the prompt is not there or does not fit the tiles.
        """
        if "input_ids" not in inputs:
            raise InputError("the prompt tells which image a tile belongs to; give input_ids")
        each, counts = self.tokens_per_image, self.sizes(inputs["input_ids"], inputs)
        tiles = [count // each for count in counts]
        if sum(tiles) != len(features) or sum(counts) != sum(tiles) * each:
            raise InputError(
                f"{sum(counts)} image placeholders do not fit {len(features)} tiles of {each}; {REMEDY}"
            )
        # the first tile of each image
        starts = [sum(tiles[:image]) for image in range(len(tiles))]
        patches = features[0].numel() // self.model.config.vision_config.hidden_size
        groups = []
        for members in alike(tiles):
            count = tiles[members[0]]
            # tiles of these images among all tiles of the prompt
            rows = [starts[image] + tile for image in members for tile in range(count)]
            # (M T, n, ...) -> (M, T n, ...)
            selected, out = (
                values[rows].unflatten(0, (-1, count)).flatten(1, 2)
                for values in (features, projected)
            )
            tokens = VisionTokens(
                features=selected,
                projected=out,
                grids=((round(each**0.5),) * 2,) * count,
                seeds=tuple(seed_of(pixels[starts[i] : starts[i] + count]) for i in members),
                projector=self.projector,
                query_key=partial(query_key, rows),
                has_cls=has_cls,
                pool=partial(self.pool, count),
                patches=partial(
                    self.tile_patches,
                    [pixels[starts[i] : starts[i] + count] for i in members],
                ),
            )
            flops = self.tower_flops([patches] * count)
            groups.append(Group(members, tokens, flops=flops))
        return Images(groups)
