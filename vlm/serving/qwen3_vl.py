"""Qwen3-VL in vLLM: Qwen2.5-VL without windows, with features for early decoder layers.

Those deepstack features stand behind a token's own and are gathered with it.
"""

from functools import cached_property
from typing import Any

from torch.nn.functional import gelu
from vllm.model_executor.models import qwen3_vl
from vllm.multimodal import MULTIMODAL_REGISTRY

from vlm_prune.vlm.projector import Projector
from vlm_prune.vlm.serving.processing import PrunedProcessor
from vlm_prune.vlm.serving.qwen2_5_vl import QwenTower
from vlm_prune.vlm.serving.selection import two_layers


class PrunedQwen3VLProcessor(PrunedProcessor, qwen3_vl.Qwen3VLMultiModalProcessor):
    """Placeholders of Qwen3-VL's images."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedQwen3VLProcessor,
    info=qwen3_vl.Qwen3VLProcessingInfo,
    dummy_inputs=qwen3_vl.Qwen3VLDummyInputsBuilder,
)
class PrunedQwen3VL(QwenTower, qwen3_vl.Qwen3VLForConditionalGeneration):
    """Qwen3-VL whose images are their kept tokens."""

    @cached_property
    def projection(self) -> Projector:
        merger: Any = self.visual.merger
        return two_layers(merger.linear_fc1, gelu, merger.linear_fc2)

    @property
    def linear(self) -> Any:
        return self.visual.merger.linear_fc1
