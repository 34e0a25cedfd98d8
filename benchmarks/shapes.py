"""Real architectures by name, to be filled with random weights where only time counts."""

from collections.abc import Callable

from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from vlm_prune.vlm.registry import Registry
from vlm_prune.vlm.tiny import checkpoint_path


def _llava_7b() -> LlavaConfig:
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
            projection_dim=768, image_size=336, patch_size=14,
        ),
        text_config=LlamaConfig(
            vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
            num_attention_heads=32, max_position_embeddings=4096,
        ),
        image_token_index=32000, image_seq_length=576,
    )  # fmt: skip


def _llava_05b() -> LlavaConfig:
    return LlavaConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=1152, intermediate_size=4304, num_hidden_layers=26, num_attention_heads=16,
            image_size=384, patch_size=14, vision_use_head=False,
        ),
        text_config=Qwen2Config(
            vocab_size=152000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=24,
            num_attention_heads=16, num_key_value_heads=16, tie_word_embeddings=True,
        ),
        image_token_index=151646, image_seq_length=729, vision_feature_layer=-1,
        vision_feature_select_strategy="full", tie_word_embeddings=True,
    )  # fmt: skip


def _tiny() -> LlavaConfig:
    return AutoConfig.from_pretrained(checkpoint_path())


SHAPES: Registry[Callable[[], LlavaConfig]] = Registry(
    "model shape", {"llava-1.5-7b": _llava_7b, "llava-0.5b": _llava_05b, "tiny": _tiny}
)
