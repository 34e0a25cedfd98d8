"""One adapter per model family: where its parts are, and nothing else."""

from typing import Any

from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.registry import Registry
from vlm_prune.vlm.families.base import Family, Need
from vlm_prune.vlm.families.gemma3 import Gemma3
from vlm_prune.vlm.families.gemma4 import Gemma4
from vlm_prune.vlm.families.glm4v import Glm4v
from vlm_prune.vlm.families.glm46v import Glm46V
from vlm_prune.vlm.families.idefics3 import Idefics3
from vlm_prune.vlm.families.internvl import InternVL
from vlm_prune.vlm.families.llava import Llava
from vlm_prune.vlm.families.llava_next import LlavaNext
from vlm_prune.vlm.families.llava_next_video import LlavaNextVideo
from vlm_prune.vlm.families.llava_onevision import LlavaOneVision
from vlm_prune.vlm.families.mistral3 import Mistral3
from vlm_prune.vlm.families.qwen2_5_vl import Qwen25VL
from vlm_prune.vlm.families.qwen3_5 import Qwen35
from vlm_prune.vlm.families.qwen3_5_moe import Qwen35Moe
from vlm_prune.vlm.families.qwen3_vl import Qwen3VL
from vlm_prune.vlm.families.qwen3_vl_moe import Qwen3VLMoe
from vlm_prune.vlm.families.smolvlm import SmolVLM

FAMILIES: Registry[type[Family]] = Registry(
    "model family",
    {
        "llava": Llava,
        "llava_next": LlavaNext,
        "llava_next_video": LlavaNextVideo,
        "llava_onevision": LlavaOneVision,
        "qwen2_5_vl": Qwen25VL,
        "qwen3_vl": Qwen3VL,
        "internvl": InternVL,
        "smolvlm": SmolVLM,
        "qwen3_vl_moe": Qwen3VLMoe,
        "idefics3": Idefics3,
        "gemma3": Gemma3,
        "mistral3": Mistral3,
        "glm4v": Glm4v,
        "glm46v": Glm46V,
        "gemma4": Gemma4,
        "qwen3_5": Qwen35,
        "qwen3_5_moe": Qwen35Moe,
    },
)

__all__ = ["FAMILIES", "Family", "Need", "check_supported", "family_of", "takes_videos"]


def takes_videos(kind: str) -> bool:
    """Returns whether models whose config says `kind` have an adapter that prunes videos."""
    return kind in FAMILIES and "videos" not in FAMILIES[kind].lacks


def check_supported(kind: str) -> None:
    """Raises `InputError` unless models whose config says `kind` have an adapter."""
    if kind not in FAMILIES:
        raise InputError(f"model type {kind!r} is not supported; supported: {', '.join(FAMILIES)}")


def family_of(model: Any) -> Family:
    """Returns the adapter of a loaded model, recognized by its config; of a
    `PeftModel`, that of the model inside.

    Raises:
        InputError: when the model is no supported vision-language model.
    """
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    check_supported(kind)
    return FAMILIES[kind](model)
