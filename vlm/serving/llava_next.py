"""LLaVA-NeXT in vLLM: LLaVA over an overview and tiles of each image, with newline tokens.

As in the Hugging Face route, newlines show nothing and are the first to go: they are kept when all
other tokens are.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    unpad_image,
)
from vllm.model_executor.models import llava, llava_next
from vllm.multimodal import MULTIMODAL_REGISTRY

from vlm_prune.vlm.families.base import seed_of
from vlm_prune.vlm.serving.llava import ClipTower
from vlm_prune.vlm.serving.processing import PrunedProcessor
from vlm_prune.vlm.serving.selection import Image, recorded_inputs


def packing(config: Any, size: tuple[int, int]) -> tuple[Tensor, tuple[tuple[int, int], ...]]:
    """Returns how the tokens of an image's tiles become its placeholders.

    Args:
        config: the model's.
        size: height and width of the image in pixels.

    Returns:
        For each placeholder its index into the tokens of all tiles, -1 for a newline, (n,), and
        the grids of the overview and of the tiles, without newlines.
    """
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    down, across = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, vision.image_size)
    overview = torch.arange(side**2)
    # tiles side by side, one grid of tokens over the whole image, then what is padding cut off
    tiles = torch.arange(down * across * side**2).view(down, across, side, side) + side**2
    whole = tiles.permute(0, 2, 1, 3).reshape(1, down * side, across * side)
    grid = unpad_image(whole, size)[0]
    newline = grid.new_full((len(grid), 1), -1)
    order = torch.cat([overview, torch.cat([grid, newline], 1).flatten()])
    return order, ((side, side), (grid.shape[0], grid.shape[1]))


class PrunedLlavaNextProcessor(PrunedProcessor, llava_next.LlavaNextMultiModalProcessor):
    """Placeholders of LLaVA-NeXT's images."""

    def newlines(self, items: Any, index: int) -> int:
        size = items.get_image_size(index)
        _, (_, (rows, _)) = packing(self.info.get_hf_config(), (size.height, size.width))
        return rows


@MULTIMODAL_REGISTRY.register_processor(
    PrunedLlavaNextProcessor,
    info=llava_next.LlavaNextProcessingInfo,
    dummy_inputs=llava.LlavaDummyInputsBuilder,
)
class PrunedLlavaNext(ClipTower, llava_next.LlavaNextForConditionalGeneration):
    """LLaVA-NeXT whose images are their kept tokens."""

    def _process_image_input(self, image_input: Any) -> Sequence[Tensor]:
        if image_input["type"] == "image_embeds":
            rows: Sequence[Tensor] = super()._process_image_input(image_input)
            return rows
        with recorded_inputs(self.attention, self.multi_modal_projector.linear_1) as seen:
            projected = self._process_image_pixels(image_input)
        orders, images, start = [], [], 0
        for picture, size, packed in zip(
            image_input["pixel_values"], image_input["image_sizes"], projected, strict=True
        ):
            views = slice(start, start + len(picture))
            start += len(picture)
            order, grids = packing(self.config, tuple(size.tolist()))
            order = order.to(seen.features.device)
            at = order[order >= 0]
            images.append(
                Image(
                    features=seen.features[views].flatten(0, 1)[at],
                    projected=packed.flatten(0, 1)[at],
                    grids=grids,
                    seed=seed_of(picture),
                    tower=(seen.normed[views],),
                    placeholders=len(order),
                )
            )
            orders.append(order)

        def pool(image: Image, values: Tensor) -> Tensor:
            order = next(o for i, o in zip(images, orders, strict=True) if i is image)
            tokens: Tensor = values.flatten(0, 1)[order[order >= 0]]
            return tokens

        kept = self.reduced(images, self.has_cls, pool)
        return [
            self.with_newlines(order, features)
            for order, (_, features) in zip(orders, kept, strict=True)
        ]

    def with_newlines(self, order: Tensor, features: Tensor) -> Tensor:
        """Returns rows (k, d_l) of an image's placeholders: newlines are
        there if all other tokens are.
        """
        if len(features) < int((order >= 0).sum()):
            return features
        rows: Tensor = self.image_newline.to(features).expand(len(order), -1).clone()
        rows[order >= 0] = features
        return rows
