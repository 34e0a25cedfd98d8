"""Qwen2.5-VL in vLLM: images of any size, 2 x 2 patches per token, three-row positions.

The features of a token are its four patches side by side, after the merger's norm; its attention is
that of its patches in the tower's last layer. Kept tokens keep their positions.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu
from vllm.model_executor.models import qwen2_5_vl
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.utils import copy_mm_embedding_modality

from vlm_prune.vlm.families.base import seed_of
from vlm_prune.vlm.projector import Projector
from vlm_prune.vlm.serving.model import PrunedModel
from vlm_prune.vlm.serving.positions import CHANNELS, expanded, split_grid, with_grid
from vlm_prune.vlm.serving.processing import PrunedProcessor
from vlm_prune.vlm.serving.selection import Image, all_heads, recorded_inputs, two_layers


class QwenTower(PrunedModel):
    """What Qwen2.5-VL and Qwen3-VL share: `visual`, and positions that are asked for twice."""

    visual: Any

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        multimodal = vllm_config.model_config.multimodal_config
        # rotary tables as long as unpruned prompts need, which vLLM's own video pruning asks for
        multimodal.is_multimodal_pruning_enabled = lambda: True
        try:
            super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        finally:
            del multimodal.is_multimodal_pruning_enabled
        self.is_multimodal_pruning_enabled = False
        # from where an image starts to where its tokens stand, for each token of a step
        tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self.offsets = torch.zeros(3, tokens, dtype=torch.long)

    @property
    def linear(self) -> Any:
        """Returns the projector's first linear layer, or what calls it."""
        raise NotImplementedError

    def in_rows(self, values: Tensor, grid: tuple[int, int, int], each: int) -> Tensor:
        """Returns values in reading order of the tokens, (N, each, ...): the tower's order undone.

        Args:
            values: in the tower's order, (N each, ...).
            grid: time, height and width in patches.
            each: patches of a token.
        """
        tokens: Tensor = values.unflatten(0, (-1, each))
        return tokens

    def query_key(self, *tower: Tensor) -> tuple[Tensor, Tensor]:
        """Returns queries and keys (M, H, P, d) of the last layer, after rotation."""
        attention = self.visual.blocks[-1].attn
        normed, cos, sin = tower
        joint, _ = attention.qkv(normed)
        heads = (3, -1, attention.hidden_size_per_attention_head)
        query, key, _ = joint.unflatten(-1, heads).unbind(2)
        splits = attention.tp_size
        query, key = (
            # images of one shape share their rotation
            attention.apply_rotary_emb(both.contiguous(), cos[0], sin[0]).transpose(1, 2)
            for both in (query, key)
        )
        return all_heads(query, splits), all_heads(key, splits)

    def pool(self, image: Image, values: Tensor) -> Tensor:
        """Returns the mean over a token's patches, (1, P, c) -> (P / 4, c)."""
        pooled: Tensor = values[0].unflatten(0, (len(image.projected), -1)).mean(1)
        return pooled

    def _process_image_input(self, image_input: Any) -> Sequence[Tensor]:
        merge = self.visual.spatial_merge_size
        grids = [tuple(row) for row in image_input["image_grid_thw"].tolist()]
        in_tokens = [(time, rows // merge, columns // merge) for time, rows, columns in grids]
        with recorded_inputs(self.visual.blocks[-1].attn, self.linear) as seen:
            whole: Sequence[Tensor] = super()._process_image_input(image_input)  # type: ignore[misc]
        if image_input["type"] == "image_embeds":
            return [
                with_grid(rows, torch.arange(len(rows), device=rows.device), grid)
                for rows, grid in zip(whole, in_tokens, strict=True)
            ]
        # features by tokens, what the attention got by patches, image by image
        patches = [time * rows * columns for time, rows, columns in grids]
        width = self.config.vision_config.out_hidden_size
        names = ("rotary_pos_emb_cos", "rotary_pos_emb_sin")
        parts = [
            seen.features.split([len(image_rows) for image_rows in whole]),
            seen.normed[:, 0].split(patches),
            *(seen.arguments[name].split(patches) for name in names),
        ]
        images = [
            Image(
                features=self.in_rows(features, grid, 1).flatten(1),
                projected=image_rows[:, :width],
                grids=((rows, columns),) * time,
                seed=seed_of(pixels),
                tower=tuple(
                    self.in_rows(part, grid, merge**2).flatten(0, 1)[None]
                    for part in (normed, cos, sin)
                ),
                placeholders=len(image_rows),
            )
            for grid, (time, rows, columns), image_rows, pixels, features, normed, cos, sin in zip(
                grids, in_tokens, whole, image_input["pixel_values"].split(patches), *parts,
                strict=True,
            )
        ]  # fmt: skip
        kept = self.reduced(images, False, self.pool)
        # features that decoder layers add stand behind the first `width` channels
        return [
            with_grid(torch.cat([features, image_rows[indices, width:]], 1), indices, grid)
            for image_rows, grid, (indices, features) in zip(whole, in_tokens, kept, strict=True)
        ]

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[Any]
    ) -> tuple[Tensor, int]:
        """Returns positions (3, L) as in the unpruned prompt; which
        tokens are kept is not known yet.
        """
        merge = self.config.vision_config.spatial_merge_size
        images, features, shift = [], [], 0
        for feature in sorted(mm_features, key=lambda f: f.mm_position.offset):
            span = feature.mm_position
            whole = span.length
            if feature.modality == "image":
                grid = feature.data["image_grid_thw"].data
                whole = int(grid.prod()) // merge**2
                images.append((span.offset, span.length, whole))
            # where the image would stand, and how long, if nothing had been dropped
            full = replace(span, offset=span.offset + shift, length=whole)
            features.append(replace(feature, mm_position=full))
            shift += whole - span.length
        ids, kept = expanded(input_tokens, images)
        positions, _ = super().get_mrope_input_positions(ids, features)  # type: ignore[misc]
        # answers go on behind the unpruned prompt
        delta = int(positions.max()) + 1 - len(input_tokens)
        positions = positions[:, torch.tensor(kept)]
        for start, count, _ in images:
            # all at the image's origin; `forward` adds where in the image they stand
            positions[:, start : start + count] = positions[0, start : start + count]
        return positions, delta

    def embed_input_ids(
        self,
        input_ids: Tensor,
        multimodal_embeddings: Sequence[Tensor] | None = None,
        *,
        is_multimodal: Tensor | None = None,
    ) -> Tensor:
        """Returns the embeddings (L, D) of a step's tokens, and notes where image tokens stand.

        Args:
            input_ids: of the step.
            multimodal_embeddings: of its images.
            is_multimodal: which tokens are image tokens.
        """
        if multimodal_embeddings and is_multimodal is not None:
            width = self.visual.out_hidden_size + CHANNELS
            rows, coordinates = [], []
            for whole in multimodal_embeddings:
                features, coordinate = whole, whole.new_zeros(len(whole), 3).long()
                if whole.shape[1] == width:
                    features, coordinate = split_grid(whole)
                rows.append(copy_mm_embedding_modality(whole, features))
                coordinates.append(coordinate)
            if len(input_ids) > self.offsets.shape[1]:
                self.offsets = self.offsets.new_zeros(3, len(input_ids))
            offsets, mask = self.offsets[:, : len(input_ids)], is_multimodal.to(input_ids.device)
            offsets.masked_scatter_(mask.expand_as(offsets), torch.cat(coordinates).T.contiguous())
            multimodal_embeddings = rows
        embedded: Tensor = super().embed_input_ids(  # type: ignore[misc]
            input_ids, multimodal_embeddings, is_multimodal=is_multimodal
        )
        return embedded

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Runs a step, with image tokens where they stood in the unpruned prompt.

        Args:
            input_ids: of the step's tokens, (T,).
            positions: of these tokens, (3, T), as vLLM numbers them.
            intermediate_tensors: of the stage before, where stages are pipelined.
            inputs_embeds: embeddings, (T, D), where the step has images.
            kwargs: other arguments of vLLM's class.
        """
        offsets = self.offsets[:, : positions.shape[-1]]
        if inputs_embeds is not None:
            positions = positions + offsets
        output = super().forward(  # type: ignore[misc]
            input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs
        )
        offsets.zero_()
        return output


class PrunedQwen25VLProcessor(PrunedProcessor, qwen2_5_vl.Qwen2_5_VLMultiModalProcessor):
    """Placeholders of Qwen2.5-VL's images."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedQwen25VLProcessor,
    info=qwen2_5_vl.Qwen2_5_VLProcessingInfo,
    dummy_inputs=qwen2_5_vl.Qwen2_5_VLDummyInputsBuilder,
)
class PrunedQwen25VL(QwenTower, qwen2_5_vl.Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL whose images are their kept tokens."""

    @cached_property
    def projection(self) -> Projector:
        one, _, two = self.visual.merger.mlp
        return two_layers(one, gelu, two)

    @property
    def linear(self) -> Any:
        return self.visual.merger.mlp

    def in_rows(self, values: Tensor, grid: tuple[int, int, int], each: int) -> Tensor:
        order, _ = self.visual.get_window_index_thw(*grid)
        return super().in_rows(values, grid, each)[order.argsort().to(values.device)]
