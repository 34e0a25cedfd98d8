"""LLaVA-1.5 in vLLM: a CLIP or SigLIP tower that ends at the layer whose output is projected."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from vllm.model_executor.models import llava
from vllm.multimodal import MULTIMODAL_REGISTRY

from vlm_prune.vlm.families.base import seed_of
from vlm_prune.vlm.projector import Projector
from vlm_prune.vlm.serving.model import PrunedModel
from vlm_prune.vlm.serving.processing import PrunedProcessor
from vlm_prune.vlm.serving.selection import Image, all_heads, recorded_inputs, two_layers


class PrunedLlavaProcessor(PrunedProcessor, llava.LlavaMultiModalProcessor):
    """Placeholders of LLaVA's images."""


class ClipTower(PrunedModel):
    """What LLaVA and LLaVA-NeXT share: `vision_tower` and `multi_modal_projector`."""

    vision_tower: Any
    multi_modal_projector: Any

    @property
    def attention(self) -> Any:
        """Returns the attention of the tower layer whose output is projected."""
        return self.vision_tower.vision_model.encoder.layers[-1].self_attn

    @property
    def has_cls(self) -> bool:
        """Returns whether the tower's output has a CLS token in front."""
        return bool(self.config.vision_feature_select_strategy == "default")

    @cached_property
    def projection(self) -> Projector:
        module = self.multi_modal_projector
        return two_layers(module.linear_1, module.act, module.linear_2)

    def query_key(self, *tower: Tensor) -> tuple[Tensor, Tensor]:
        attention, (normed,) = self.attention, tower
        joint, _ = attention.qkv_proj(normed)
        query, key, _ = joint.unflatten(-1, (3, -1, attention.head_dim)).unbind(2)
        splits = attention.tp_size
        return all_heads(query.transpose(1, 2), splits), all_heads(key.transpose(1, 2), splits)


@MULTIMODAL_REGISTRY.register_processor(
    PrunedLlavaProcessor,
    info=llava.LlavaProcessingInfo,
    dummy_inputs=llava.LlavaDummyInputsBuilder,
)
class PrunedLlava(ClipTower, llava.LlavaForConditionalGeneration):
    """LLaVA-1.5 whose images are their kept tokens."""

    def _process_image_input(self, image_input: Any) -> Tensor | Sequence[Tensor]:
        if image_input["type"] == "image_embeds":
            rows: Tensor = super()._process_image_input(image_input)
            return rows
        pixels = image_input["pixel_values"]
        if self.pruner.stage == "input":
            return self.of_smaller(self.pruner.shrunk(pixels, self.config.vision_config.patch_size))
        with recorded_inputs(self.attention, self.multi_modal_projector.linear_1) as seen:
            projected = super()._process_image_input(image_input)
        side = round(projected.shape[1] ** 0.5)
        images = [
            Image(
                features,
                projection,
                ((side, side),),
                seed_of(picture),
                (normed[None],),
                len(projection),
            )
            for features, projection, picture, normed in zip(
                seen.features, projected, pixels, seen.normed, strict=True
            )
        ]
        return torch.stack([features for _, features in self.reduced(images, self.has_cls)])

    def of_smaller(self, pixels: Tensor) -> Tensor:
        """Returns all tokens of images (M, 3, H, W) that are smaller than
        the tower's own, (M, k, d_l).
        """
        embeddings = self.vision_tower.vision_model.embeddings
        patch = self.config.vision_config.patch_size
        with smaller_table(embeddings, pixels.shape[-2] // patch, pixels.shape[-1] // patch):
            features = self._image_pixels_to_features(self.vision_tower, pixels)
        projected: Tensor = self.multi_modal_projector(features)
        return projected


@contextmanager
def smaller_table(embeddings: Any, rows: int, columns: int) -> Iterator[None]:
    """Interpolates a tower's table of position embeddings to other images inside the block.

    Args:
        embeddings: the tower's.
        rows: of patches in the images.
        columns: of patches in the images.
    """

    def interpolated(_: Any, args: Any, table: Tensor) -> Tensor:
        # what is in front of the patches, the CLS token's, stays
        side = round(embeddings.num_patches**0.5)
        # the CLS token's position in front, then those of a square grid
        front, patches = table[:, : -(side**2)], table[:, -(side**2) :]
        grid = patches.unflatten(1, (side, side)).permute(0, 3, 1, 2)
        smaller = interpolate(grid, (rows, columns), mode="bicubic", align_corners=False)
        return torch.cat([front, smaller.flatten(2).transpose(1, 2)], 1)

    hook = embeddings.position_embedding.register_forward_hook(interpolated)
    try:
        yield
    finally:
        hook.remove()
