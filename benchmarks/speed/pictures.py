"""Random images and videos as the processors of each family would give them, where only time counts."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.registry import Registry
from vlm_prune.vlm.families import Family, family_of
from vlm_prune.vlm.families.base import PIXELS

SIDE = 672  # of a picture in pixels where a model takes any size: 2 x 2 tiles of most towers
FRAME_SIDE = 448  # of a frame, likewise
SCENES, NOISE = 4, 0.3  # pictures that a video shows one after the other, and what changes in them
MARKERS = (10, 11)
"""Text in front of a tile and of the overview, or behind a row and the last one, where there is such."""


def random_pictures(model: Any, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Returns what the processor says about one picture for each prompt, of random pixels.

    Next to `pixel_values` and the family's `image_inputs`, `input_ids` (B, n) holds the part of a
    prompt that stands for its picture.

    Args:
        model: the model.
        batch: prompts B.
        generator: draws the pixels.
    """
    family = family_of(model)
    shapes, inputs, part = LAYOUTS[model.config.model_type](family, batch)
    pixels = torch.randn(shapes, generator=generator).to(model.device, model.dtype)
    ids = torch.tensor(part).expand(batch, -1)
    inputs = {"input_ids": ids, **inputs}
    return {key: value.to(model.device) for key, value in inputs.items()} | {"pixel_values": pixels}


def random_videos(
    model: Any, frames: int, batch: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Returns what the processor says about one video for each prompt, of scenes of random pixels.

    Next to `pixel_values_videos`, or `pixel_values` where frames are images, and the family's
    `video_inputs`, `input_ids` (B, n) holds the part of a prompt that stands for its video.

    Args:
        model: the model.
        frames: of a video.
        batch: prompts B.
        generator: draws the pixels.

    Raises:
        InputError: if the model takes no videos, or not so many frames.
    """
    family, kind = family_of(model), model.config.model_type
    if kind not in VIDEO_LAYOUTS:
        raise InputError(
            f"{kind} models take no videos here; give a shape of {', '.join(VIDEO_LAYOUTS)}"
        )
    shape, inputs, part = VIDEO_LAYOUTS[kind](family, frames, batch)
    scenes = torch.randn(SCENES, *shape[2:], generator=generator)
    which = torch.arange(shape[1]) * SCENES // shape[1]
    pixels = torch.stack(
        [
            scenes[which] + NOISE * torch.randn(shape[1:], generator=generator)
            for _ in range(shape[0])
        ]
    )
    # Qwen's processor gives the patches of all frames as one list
    pixels = pixels.flatten(0, 2) if pixels.ndim == 4 else pixels
    inputs |= {"input_ids": torch.tensor(part).expand(batch, -1)}
    given = {key: value.to(model.device) for key, value in inputs.items()}
    if family.frames_as_images:
        pixels = pixels if family.by_row else pixels.flatten(0, 1)
    return given | {PIXELS[family.kind_of(frames)]: pixels.to(model.device, model.dtype)}


Layout = tuple[tuple[int, ...], dict[str, Tensor], list[int]]


def _square(family: Family) -> tuple[int, ...]:
    """Returns channels and sides of one view."""
    vision = family.model.config.vision_config
    sides = vision.image_size
    return (vision.num_channels, *([sides, sides] if isinstance(sides, int) else sides))


def _one(family: Family, batch: int) -> Layout:
    return (batch, *_square(family)), {}, [family.image_token] * family.tokens_per_image


def _any_resolution(family: Family, batch: int) -> Layout:
    """Lays out an overview and the tiles of a picture twice as wide and as high."""
    channels, *sides = _square(family)
    inputs = {"image_sizes": torch.tensor([[2 * side for side in sides]] * batch)}
    if family.by_row:
        inputs["batch_num_images"] = torch.ones(batch, dtype=torch.long)
    (tiles,) = set(family.tiles(inputs))  # type: ignore[attr-defined]
    (tokens,) = set(family.sizes(torch.empty(0), inputs))
    return (batch, tiles, channels, *sides), inputs, [family.image_token] * tokens


def _patches(family: Family, batch: int) -> Layout:
    vision = family.model.config.vision_config
    merge = vision.spatial_merge_size
    side = SIDE // vision.patch_size // merge * merge
    grid = torch.tensor([[1, side, side]] * batch)
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    tokens = [family.image_token] * (side // merge) ** 2
    return (batch * side**2, values), {"image_grid_thw": grid}, tokens


def _tiles(family: Family, batch: int) -> Layout:
    """Lays out four tiles and an overview in one run of placeholders."""
    return (
        (batch * 5, *_square(family)), {}, [family.image_token] * 5 * family.tokens_per_image
    )  # fmt: skip


def _marked_tiles(family: Family, batch: int) -> Layout:
    """Lays out four tiles and an overview, each behind a marker;
    that of the overview is another.
    """
    run, (tile, overview) = [family.image_token] * family.tokens_per_image, MARKERS
    return (batch, 5, *_square(family)), {}, [*[tile, *run] * 4, overview, *run]


def _rows(family: Family, batch: int) -> Layout:
    """Lays out rows of tokens, each before a marker; the last one's is another."""
    vision, config = family.model.config.vision_config, family.model.config
    side = SIDE // (vision.patch_size * config.spatial_merge_size)
    pixels = side * vision.patch_size * config.spatial_merge_size
    inputs = {"image_sizes": torch.tensor([[pixels, pixels]] * batch)}
    row, (end, last) = [family.image_token] * side, MARKERS
    return (
        (batch, vision.num_channels, pixels, pixels), inputs, [*[*row, end] * (side - 1), *row, last]
    )  # fmt: skip


def _positions(family: Family, batch: int) -> Layout:
    """Lays out flattened patches, each with its column and row."""
    vision = family.model.config.vision_config
    side = SIDE // (vision.patch_size * vision.pooling_kernel_size) * vision.pooling_kernel_size
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    positions = torch.stack([columns, rows], -1).flatten(0, 1)
    inputs = {"image_position_ids": positions.expand(batch, -1, -1)}
    tokens = [family.image_token] * (side // vision.pooling_kernel_size) ** 2
    return (batch, side**2, 3 * vision.patch_size**2), inputs, tokens


def _views(family: Family, frames: int, batch: int) -> Layout:
    """Lays out frames of the tower's size, and a newline behind the last."""
    shape = (batch, frames, *_square(family))
    meta = torch.empty(shape, device="meta")
    (_, rows, columns) = family.video_grids({"pixel_values_videos": meta})[0]
    return shape, {}, [family.video_token] * (frames * rows * columns + 1)


def _frames(family: Family, frames: int, batch: int) -> Layout:
    """Lays out frames of the tower's size."""
    shape, inputs, pads = _views(family, frames, batch)
    return shape, inputs, pads[:-1]


def _pairs(family: Family, frames: int, batch: int) -> Layout:
    """Lays out flattened patches, (B, T, P, c), T frames of which each holds two."""
    vision = family.model.config.vision_config
    merge, together = vision.spatial_merge_size, vision.temporal_patch_size
    if frames % together:
        raise InputError(
            f"{frames} frames are no multiple of the {together} that this model encodes as one"
        )
    side = FRAME_SIDE // vision.patch_size // merge * merge
    grid = torch.tensor([[frames // together, side, side]] * batch)
    values = vision.in_channels * together * vision.patch_size**2
    inputs = {"video_grid_thw": grid, "second_per_grid_ts": torch.ones(batch)}
    pads = [family.video_token] * ((side // merge) ** 2 * frames // together)
    return (batch, frames // together, side**2, values), inputs, pads


def _stamped_pairs(family: Family, frames: int, batch: int) -> Layout:
    """Lays out flattened patches, each frame between markers and behind its time."""
    shape, inputs, pads = _pairs(family, frames, batch)
    config = family.model.config
    each = pads[: len(pads) // shape[1]]
    frame = [*MARKERS, config.vision_start_token_id, *each, config.vision_end_token_id]
    return shape, {"video_grid_thw": inputs["video_grid_thw"]}, frame * shape[1]


def _marked_frames(family: Family, frames: int, batch: int) -> Layout:
    """Lays out frames of one tile, each between markers and behind a number or a time."""
    before, behind = family.frame_markers  # type: ignore[attr-defined]
    pads = [family.image_token] * family.tokens_per_image
    # what stands in front of a frame's tokens is alike, as a tile's marker is
    frame = [*MARKERS, *[MARKERS[0]] * before, *pads, *[MARKERS[1]] * behind]
    return (batch, frames, *_square(family)), {}, frame * frames


VIDEO_LAYOUTS: Registry[Callable[[Family, int, int], Layout]] = Registry(
    "model family that takes videos",
    {
        "llava_next_video": _frames,
        "llava_onevision": _views,
        "qwen2_5_vl": _pairs,
        "qwen3_vl": _stamped_pairs,
        "internvl": _marked_frames,
        "smolvlm": _marked_frames,
        "qwen3_vl_moe": _stamped_pairs,
    },
)
LAYOUTS: Registry[Callable[[Family, int], Layout]] = Registry(
    "model family",
    {
        "llava": _one,
        "llava_next": _any_resolution,
        "llava_next_video": _any_resolution,
        "llava_onevision": _any_resolution,
        "qwen2_5_vl": _patches,
        "qwen3_vl": _patches,
        "internvl": _tiles,
        "smolvlm": _marked_tiles,
        "qwen3_vl_moe": _patches,
        "idefics3": _marked_tiles,
        "gemma3": _one,
        "mistral3": _rows,
        "glm4v": _patches,
        "glm46v": _patches,
        "gemma4": _positions,
        "qwen3_5": _patches,
        "qwen3_5_moe": _patches,
    },
)
