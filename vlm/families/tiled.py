"""What families share whose images are tiles of equally many tokens, several patches per token."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.encoded import Group, Images
from vlm_prune.vlm.families.base import Family, Kind, Need, patched, seed_of
from vlm_prune.vlm.layout import REMEDY, alike, image_runs, repeated, stamped_frames
from vlm_prune.vlm.tokens import VisionTokens


@dataclass(frozen=True)
class Tiled(Family):
    """Pixels hold tiles alone; which image a tile belongs to is told by the prompt.

    Frames of a video are images of one tile; which images they are is told by `video_frames`, the
    frames of each video in the prompt's order, 0 for images. `frame_markers` says how many tokens in
    front of a frame's and behind them are its markers, `separators` how many of those behind separate
    it from the next frame.

    The projector reads the patches of a token side by side. A token receives the mean attention of
    its patches within their tile.
    """

    lacks: ClassVar[frozenset[Need]] = frozenset(
        {"a fixed image size", "a tower that takes smaller images"}
    )
    frame_markers: ClassVar[tuple[int, int]] = (1, 1)
    separators: ClassVar[int] = 0

    def counts(
        self, input_ids: Tensor, inputs: Mapping[str, Any], kind: Kind = "image"
    ) -> list[int]:
        if inputs.get("pixel_values") is None and not inputs.get("mm_encoder_outputs"):
            return []
        return self.item_sizes(input_ids, inputs)[0]

    def item_sizes(
        self, input_ids: Tensor, inputs: Mapping[str, Any]
    ) -> tuple[list[int], list[int]]:
        """Returns the number of placeholders of each image or video, and of its frames, 0 for images.

        Args:
            input_ids: (B, L).
            inputs: what the forward is given, with `video_frames`.

        Raises:
            InputError: when these are not those of the prompt, or a frame has several tiles.
        """
        sizes, frames = self.sizes(input_ids, inputs), inputs.get("video_frames")
        if frames is None:
            return sizes, [0] * len(sizes)
        images = [max(1, count) for count in frames]
        # beam search repeats the rows of a prompt
        copies = max(1, len(sizes) // max(1, sum(images)))
        if len(sizes) != copies * sum(images):
            raise InputError(
                f"video_frames {list(frames)} stand for {sum(images)} images, and the prompt shows "
                f"{len(sizes)}; give the frames of each video in its order, 0 for an image"
            )
        if copies > 1:
            own, _ = self.item_sizes(input_ids[::copies], inputs)
            order = repeated(own, input_ids == self.image_token)
            return [own[item] for item in order], [frames[item] for item in order]
        ends = list(accumulate(images))
        found = [sizes[end - count : end] for end, count in zip(ends, images, strict=True)]
        for own, count in zip(found, frames, strict=True):
            if count and {*own} != {self.tokens_per_image}:
                raise InputError(
                    f"a frame of a video has {self.tokens_per_image} tokens, and these have "
                    f"{sorted({*own})}; give them to the processor as a video"
                )
        return list(map(sum, found)), list(frames)

    def video_grids(self, inputs: Mapping[str, Any]) -> list[tuple[int, int, int]]:
        side = round(self.tokens_per_image**0.5)
        return [(frames, side, side) for frames in inputs["video_frames"] if frames]

    def frame_lines(
        self, input_ids: Tensor, ordinal: Tensor, frames: Sequence[int]
    ) -> Tensor | None:
        """Returns for each token the frame that it goes with: a frame's tokens, the markers around
        them, and the text in front.

        Args:
            input_ids: (B, L).
            ordinal: the image or video of each placeholder, -1 for text, (B, L).
            frames: of each video, 0 for images.
        """
        spans, videos = list[tuple[int, int, int]](), list[int]()
        before, behind = self.frame_markers
        for row, column, length in image_runs(input_ids == self.image_token):
            item = int(ordinal[row, column])
            if frames[item]:
                # markers of two frames do not overlap
                first = max(column - before, 0)
                if videos and spans[-1][0] == row:
                    first = max(first, spans[-1][2])
                spans.append((row, first, min(column + length + behind, input_ids.shape[1])))
                videos.append(item)
        return stamped_frames(input_ids, videos, spans, separators=self.separators)

    @abstractmethod
    def patches(self, values: Tensor) -> Tensor:
        """Shuffles patches as the model does, (T, S, c) -> (T, n, f c), f patches per token."""

    def pool(self, tiles: int, values: Tensor) -> Tensor:
        """Returns the mean over a token's patches, (M T, S, c) -> (M, T n, c)."""
        patches = self.patches(values).unflatten(-1, (-1, values.shape[-1])).mean(2)
        pooled: Tensor = patches.unflatten(0, (-1, tiles)).flatten(1, 2)
        return pooled

    @staticmethod
    def tiles_query_key(
        query_key: Callable[[list[int]], tuple[Tensor, Tensor]], rows: list[int], tiles: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Returns queries and keys of some tiles of a group's.

        Args:
            query_key: gives those of tiles of the prompt.
            rows: of the group's tiles among these.
            tiles: numbers among the group's.
        """
        return query_key([rows[tile] for tile in tiles])

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
        each = self.tokens_per_image
        counts, frames = self.item_sizes(inputs["input_ids"], inputs)
        tiles = [count // each for count in counts]
        if sum(tiles) != len(features) or sum(counts) != sum(tiles) * each:
            raise InputError(
                f"{sum(counts)} image placeholders do not fit {len(features)} tiles of {each}; {REMEDY}"
            )
        # the first tile of each image
        starts = [sum(tiles[:image]) for image in range(len(tiles))]
        patches = features[0].numel() // self.model.config.vision_config.hidden_size
        groups = []
        for members in alike(list(zip(tiles, frames, strict=True))):
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
                pool=partial(self.pool, 1 if frames[members[0]] else count),
                patches=partial(
                    self.tile_patches,
                    [pixels[starts[i] : starts[i] + count] for i in members],
                ),
                frames=frames[members[0]],
                frames_query_key=partial(self.tiles_query_key, query_key, rows),
            )
            flops = self.tower_flops([patches] * count)
            groups.append(Group(members, tokens, flops=flops))
        return Images(groups)
