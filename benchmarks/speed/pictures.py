"""Random images as the processors of each family would give them, where only time counts."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlm_prune.vlm.common.registry import Registry
from vlm_prune.vlm.families import Family, family_of

SIDE = 672  # of a picture in pixels where a model takes any size: 2 x 2 tiles of most towers
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


Layout = tuple[tuple[int, ...], dict[str, Tensor], list[int]]


def _square(family: Family) -> tuple[int, ...]:
    """Channels and sides of one view."""
    vision = family.model.config.vision_config
    sides = vision.image_size
    return (vision.num_channels, *([sides, sides] if isinstance(sides, int) else sides))


def _one(family: Family, batch: int) -> Layout:
    return (batch, *_square(family)), {}, [family.image_token] * family.tokens_per_image


def _any_resolution(family: Family, batch: int) -> Layout:
    """An overview and the tiles of a picture twice as wide and as high."""
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
    """Four tiles and an overview in one run of placeholders."""
    return (
        (batch * 5, *_square(family)), {}, [family.image_token] * 5 * family.tokens_per_image
    )  # fmt: skip


def _marked_tiles(family: Family, batch: int) -> Layout:
    """The same, each behind a marker; that of the overview is another."""
    run, (tile, overview) = [family.image_token] * family.tokens_per_image, MARKERS
    return (batch, 5, *_square(family)), {}, [*[tile, *run] * 4, overview, *run]


def _rows(family: Family, batch: int) -> Layout:
    """Rows of tokens, each before a marker; the last one's is another."""
    vision, config = family.model.config.vision_config, family.model.config
    side = SIDE // (vision.patch_size * config.spatial_merge_size)
    pixels = side * vision.patch_size * config.spatial_merge_size
    inputs = {"image_sizes": torch.tensor([[pixels, pixels]] * batch)}
    row, (end, last) = [family.image_token] * side, MARKERS
    return (
        (batch, vision.num_channels, pixels, pixels), inputs, [*[*row, end] * (side - 1), *row, last]
    )  # fmt: skip


def _positions(family: Family, batch: int) -> Layout:
    """Flattened patches, each with its column and row."""
    vision = family.model.config.vision_config
    side = SIDE // (vision.patch_size * vision.pooling_kernel_size) * vision.pooling_kernel_size
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    positions = torch.stack([columns, rows], -1).flatten(0, 1)
    inputs = {"image_position_ids": positions.expand(batch, -1, -1)}
    tokens = [family.image_token] * (side // vision.pooling_kernel_size) ** 2
    return (batch, side**2, 3 * vision.patch_size**2), inputs, tokens


LAYOUTS: Registry[Callable[[Family, int], Layout]] = Registry(
    "model family",
    {
        "llava": _one,
        "llava_next": _any_resolution,
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
