"""InternVL in vLLM (the `-hf` checkpoints): tiles of 2 x 2 patches per token, with a CLS token."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from torch import Tensor
from vllm.model_executor.models import interns1
from vllm.multimodal import MULTIMODAL_REGISTRY

from vlm_prune.vlm.families.base import seed_of
from vlm_prune.vlm.projector import Projector
from vlm_prune.vlm.serving.model import PrunedModel
from vlm_prune.vlm.serving.processing import PrunedProcessor
from vlm_prune.vlm.serving.selection import Image, recorded_inputs, two_layers


class PrunedInternVLProcessor(PrunedProcessor, interns1.InternS1MultiModalProcessor):
    """Placeholders of InternVL's images."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedInternVLProcessor,
    info=interns1.InternS1ProcessingInfo,
    dummy_inputs=interns1.InternS1DummyInputsBuilder,
)
class PrunedInternVL(PrunedModel, interns1.InternS1ForConditionalGeneration):
    """InternVL whose images are their kept tokens."""

    @property
    def attention(self) -> Any:
        """Returns the attention of the tower layer whose output is projected."""
        return self.vision_tower.encoder.layer[-1].attention

    @cached_property
    def projection(self) -> Projector:
        module = self.multi_modal_projector
        return two_layers(module.linear_1, module.act, module.linear_2)

    def query_key(self, *tower: Tensor) -> tuple[Tensor, Tensor]:
        attention, (normed,) = self.attention, tower
        query, key = attention.q_proj(normed), attention.k_proj(normed)
        if attention.qk_normalization:
            query, key = attention.q_norm(query), attention.k_norm(key)
        heads = (attention.num_heads, attention.head_dim)
        return query.unflatten(-1, heads).transpose(1, 2), key.unflatten(-1, heads).transpose(1, 2)

    def pool(self, image: Image, values: Tensor) -> Tensor:
        """Returns the mean over the patches of a token, (T, S, c) -> (T n, c)."""
        side = round(values.shape[1] ** 0.5)
        shuffled = self.pixel_shuffle(
            values.unflatten(1, (side, side)).contiguous(), self.downsample_ratio
        )
        pooled: Tensor = shuffled.flatten(0, 2).unflatten(-1, (-1, values.shape[-1])).mean(1)
        return pooled

    def _process_vision_input(self, image_input: Any) -> Sequence[Tensor]:
        with recorded_inputs(self.attention, self.multi_modal_projector.linear_1) as seen:
            whole: Sequence[Tensor] = super()._process_vision_input(image_input)
        if image_input["type"] != "pixel_values":
            return whole
        tiles = [int(count) for count in image_input["num_patches"]]
        side = round(seen.features.shape[1] ** 0.5)
        images = [
            Image(
                features=image_tiles.flatten(0, 1),
                projected=projected,
                grids=((side, side),) * len(image_tiles),
                seed=seed_of(pixels),
                tower=(normed,),
                placeholders=len(projected),
            )
            for image_tiles, projected, pixels, normed in zip(
                seen.features.split(tiles),
                whole,
                image_input["pixel_values"].split(tiles),
                seen.normed.split(tiles),
                strict=True,
            )
        ]
        return [features for _, features in self.reduced(images, True, self.pool)]
