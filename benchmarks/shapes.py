"""Real architectures by name, to be filled with random weights where only time counts."""

from collections.abc import Callable

from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    Qwen2Config,
)

from vlm_prune.vlm.registry import Registry
from vlm_prune.vlm.tiny import checkpoint_path


def _clip_large() -> CLIPVisionConfig:
    """ViT-L/14 at 336 pixels: 576 tokens."""
    return CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
        projection_dim=768, image_size=336, patch_size=14,
    )  # fmt: skip


def _llava_7b() -> LlavaConfig:
    return LlavaConfig(
        vision_config=_clip_large(),
        text_config=LlamaConfig(
            vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
            num_attention_heads=32, max_position_embeddings=4096,
        ),
        image_token_index=32000, image_seq_length=576,
    )  # fmt: skip


def _llava_05b() -> LlavaConfig:
    """LLaVA-1.5 over Qwen1.5-0.5B."""
    return LlavaConfig(
        vision_config=_clip_large(),
        text_config=Qwen2Config(
            vocab_size=152000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=24,
            num_attention_heads=16, num_key_value_heads=16, tie_word_embeddings=True,
        ),
        image_token_index=151646, image_seq_length=576, tie_word_embeddings=True,
    )  # fmt: skip


def _tiny() -> LlavaConfig:
    return AutoConfig.from_pretrained(checkpoint_path())


SHAPES: Registry[Callable[[], LlavaConfig]] = Registry(
    "model shape", {"llava-1.5-7b": _llava_7b, "llava-0.5b": _llava_05b, "tiny": _tiny}
)
