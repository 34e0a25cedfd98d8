"""Idefics3 in transformers: SmolVLM's tiles, markers and connector over a larger Llama."""

from dataclasses import dataclass
from typing import ClassVar

from vlm_prune.vlm.families.smolvlm import SmolVLM


@dataclass(frozen=True)
class Idefics3(SmolVLM):
    """Paths into an `Idefics3ForConditionalGeneration`; its processor takes no videos."""

    frames_as_images: ClassVar[bool] = False
