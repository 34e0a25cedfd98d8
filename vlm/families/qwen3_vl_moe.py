"""Qwen3-VL with a mixture of experts in its decoder layers: tower, merger and layout are the same."""

from dataclasses import dataclass

from vlm_prune.vlm.families.qwen3_vl import Qwen3VL


@dataclass(frozen=True)
class Qwen3VLMoe(Qwen3VL):
    """Paths into a `Qwen3VLMoeForConditionalGeneration`."""
