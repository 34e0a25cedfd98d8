"""LLaVA-1.5 in transformers: a CLIP tower, a two-layer projector, a Llama-style decoder."""

import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlm_prune.vlm.attention import encoder_query_key
from vlm_prune.vlm.tokens import Projector, VisionTokens


@dataclass(frozen=True)
class Llava:
    """Paths into a `LlavaForConditionalGeneration`."""

    model: Any

    @property
    def image_token(self) -> int:
        return int(self.model.config.image_token_id)

    @property
    def tokens_per_image(self) -> int:
        vision = self.model.config.vision_config
        return int((vision.image_size // vision.patch_size) ** 2)

    @property
    def multimodal(self) -> nn.Module:
        """The module that merges image features into the embeddings."""
        module: nn.Module = self.model.model
        return module

    @property
    def decoder(self) -> Any:
        """The language model: `.layers`, `.rotary_emb`, `.config`."""
        return self.model.model.language_model

    @property
    def tower_layers(self) -> Any:
        tower = self.model.model.vision_tower
        return getattr(tower, "vision_model", tower).encoder.layers

    @torch.no_grad()
    def encode(self, pixel_values: Tensor) -> VisionTokens:
        """Run tower and projector on (M, 3, H, W) pixels.

        Sizes other than the trained one interpolate the position embeddings.
        """
        config = self.model.config
        size, patch = config.vision_config.image_size, config.vision_config.patch_size
        resized = tuple(pixel_values.shape[-2:]) != (size, size)
        output = self.model.model.get_image_features(
            pixel_values.to(self.model.device, self.model.dtype),
            output_hidden_states=True,
            return_dict=True,
            **({"interpolate_pos_encoding": True} if resized else {}),
        )
        layer = config.vision_feature_layer
        first = 1 if config.vision_feature_select_strategy == "default" else 0
        states = output.hidden_states

        @torch.no_grad()
        def query_key() -> tuple[Tensor, Tensor]:
            index = layer if layer >= 0 else len(states) + layer
            return encoder_query_key(self.tower_layers[index - 1], states[index - 1])

        return VisionTokens(
            features=states[layer][:, first:],
            projected=torch.stack(list(output.pooler_output)),
            grid=(pixel_values.shape[-2] // patch, pixel_values.shape[-1] // patch),
            seeds=tuple(zlib.crc32(p.float().cpu().numpy().tobytes()) for p in pixel_values),
            projector=self.projector,
            query_key=query_key,
            keys=lambda: query_key()[1].transpose(1, 2).flatten(2)[:, first:],
        )

    @property
    def projector(self) -> Projector:
        module = self.model.model.multi_modal_projector
        one, two = module.linear_1, module.linear_2
        return Projector(one.weight, one.bias, module.act, two.weight, two.bias)
