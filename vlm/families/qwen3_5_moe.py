"""Qwen3.5 with a mixture of experts in its decoder layers: tower, merger and layout are the same."""

from dataclasses import dataclass

from vlm_prune.vlm.families.qwen3_5 import Qwen35


@dataclass(frozen=True)
class Qwen35Moe(Qwen35):
    """Paths into a `Qwen3_5MoeForConditionalGeneration`."""
