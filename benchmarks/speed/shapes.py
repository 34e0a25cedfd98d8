"""Real architectures by name, to be filled with random weights where only time counts."""

from collections.abc import Callable

from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma4Config,
    Glm4vConfig,
    Glm46VConfig,
    Idefics3Config,
    InternVLConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextVideoConfig,
    LlavaOnevisionConfig,
    Mistral3Config,
    MistralConfig,
    PixtralVisionConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen3_5Config,
    Qwen3_5MoeConfig,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
    SiglipVisionConfig,
    SmolVLMConfig,
)

from vlm_prune.vlm.common.registry import Registry
from vlm_prune.vlm.tiny import checkpoint_path


def _clip_large() -> CLIPVisionConfig:
    """Returns ViT-L/14 at 336 pixels: 576 tokens."""
    return CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
        projection_dim=768, image_size=336, patch_size=14,
    )  # fmt: skip


def _llama_7b() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, max_position_embeddings=4096,
    )  # fmt: skip


def _qwen2_05b(vocabulary: int, tied: bool) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=vocabulary, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip


def _llava_7b() -> LlavaConfig:
    return LlavaConfig(
        vision_config=_clip_large(), text_config=_llama_7b(), image_token_index=32000,
        image_seq_length=576,
    )  # fmt: skip


def _llava_next_7b() -> LlavaNextConfig:
    return LlavaNextConfig(
        vision_config=_clip_large(), text_config=_llama_7b(), image_token_index=32000
    )


def _llava_next_video_7b() -> LlavaNextVideoConfig:
    return LlavaNextVideoConfig(
        vision_config=_clip_large(), text_config=_llama_7b(), image_token_index=32001,
        video_token_index=32000,
    )  # fmt: skip


def _llava_onevision_05b() -> LlavaOnevisionConfig:
    return LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=1152, intermediate_size=4304, num_hidden_layers=26, num_attention_heads=16,
            image_size=384, patch_size=14, vision_use_head=False,
        ),
        text_config=_qwen2_05b(152000, tied=True), image_token_index=151646, video_token_index=151647,
        tie_word_embeddings=True,
    )  # fmt: skip


QWEN_IDS = {
    "image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652,
    "vision_end_token_id": 151653, "tie_word_embeddings": True,
}  # fmt: skip


def _qwen2_5_vl_3b() -> Qwen2_5_VLConfig:
    return Qwen2_5_VLConfig(
        vision_config={
            "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
            "out_hidden_size": 2048, "patch_size": 14, "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        text_config={
            "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 11008,
            "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]
            },
        },
        **QWEN_IDS,
    )  # fmt: skip


def _qwen3_vl_2b() -> Qwen3VLConfig:
    return Qwen3VLConfig(
        vision_config={
            "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16,
            "out_hidden_size": 2048, "patch_size": 16, "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [5, 11, 17],
        },
        text_config={
            "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
            "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
            "head_dim": 128, "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
        },
        **QWEN_IDS,
    )  # fmt: skip


def _qwen3_vl_30b_a3b() -> Qwen3VLMoeConfig:
    return Qwen3VLMoeConfig(
        vision_config={
            "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16,
            "out_hidden_size": 2048, "patch_size": 16, "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [8, 16, 24],
        },
        text_config={
            "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
            "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
            "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
            "head_dim": 128, "tie_word_embeddings": False,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
        },
        **QWEN_IDS | {"tie_word_embeddings": False},
    )  # fmt: skip


def _qwen3_5_vision(width: int) -> dict[str, int]:
    return {
        "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16,
        "out_hidden_size": width, "patch_size": 16, "num_position_embeddings": 2304,
    }  # fmt: skip


QWEN3_5_TEXT = {
    "vocab_size": 248320, "num_attention_heads": 16, "head_dim": 256, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e7, "mrope_section": [11, 11, 10],
        "mrope_interleaved": True, "partial_rotary_factor": 0.25,
    },
}  # fmt: skip


def _qwen3_5_9b() -> Qwen3_5Config:
    return Qwen3_5Config(
        vision_config=_qwen3_5_vision(4096),
        text_config={
            "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 32,
            "num_key_value_heads": 4, **QWEN3_5_TEXT,
        },
        tie_word_embeddings=False,
    )  # fmt: skip


def _qwen3_5_35b_a3b() -> Qwen3_5MoeConfig:
    return Qwen3_5MoeConfig(
        vision_config=_qwen3_5_vision(2048),
        text_config={
            "hidden_size": 2048, "num_hidden_layers": 40, "num_key_value_heads": 2,
            "num_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512, **QWEN3_5_TEXT,
        },
        tie_word_embeddings=False,
    )  # fmt: skip


def _internvl3_1b() -> InternVLConfig:
    return InternVLConfig(
        vision_config={
            "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
            "num_attention_heads": 16, "image_size": [448, 448], "patch_size": [14, 14],
            "norm_type": "layer_norm", "attention_bias": True,
        },
        text_config=_qwen2_05b(151674, tied=False), image_token_id=151667,
        tie_word_embeddings=False,
    )  # fmt: skip


def _smolvlm_256m() -> SmolVLMConfig:
    return SmolVLMConfig(
        vision_config={
            "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
            "num_attention_heads": 12, "image_size": 512, "patch_size": 16,
        },
        text_config=LlamaConfig(
            vocab_size=49280, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
            num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=False,
        ),
        scale_factor=4, image_token_id=49190, tie_word_embeddings=False,
    )  # fmt: skip


def _idefics3_8b() -> Idefics3Config:
    return Idefics3Config(
        vision_config={
            "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
            "num_attention_heads": 16, "image_size": 364, "patch_size": 14,
        },
        text_config=LlamaConfig(
            vocab_size=128259, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False,
        ),
        scale_factor=2, image_token_id=128257, tie_word_embeddings=False,
    )  # fmt: skip


def _gemma3_4b() -> Gemma3Config:
    return Gemma3Config(
        vision_config={
            "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
            "num_attention_heads": 16, "image_size": 896, "patch_size": 14,
            "vision_use_head": False,
        },
        text_config={
            "vocab_size": 262208, "hidden_size": 2560, "intermediate_size": 10240,
            "num_hidden_layers": 34, "num_attention_heads": 8, "num_key_value_heads": 4,
            "head_dim": 256, "sliding_window": 1024, "query_pre_attn_scalar": 256,
        },
    )  # fmt: skip


def _gemma4_e2b() -> Gemma4Config:
    """Returns Gemma 4 E2B without its tower for sound; the tower for images is the default one."""
    kinds = [*["sliding_attention"] * 4, "full_attention"] * 7
    return Gemma4Config(
        text_config={
            "hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 35,
            "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256,
            "global_head_dim": 512, "sliding_window": 512, "num_kv_shared_layers": 20,
            "use_double_wide_mlp": True, "final_logit_softcapping": 30.0, "layer_types": kinds,
        },
    )  # fmt: skip


def _mistral_small_31_24b() -> Mistral3Config:
    return Mistral3Config(
        vision_config=PixtralVisionConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
            image_size=1540, patch_size=14, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        ),
        text_config=MistralConfig(
            vocab_size=131072, hidden_size=5120, intermediate_size=32768, num_hidden_layers=40,
            num_attention_heads=32, num_key_value_heads=8, head_dim=128, sliding_window=None,
            tie_word_embeddings=False,
        ),
        spatial_merge_size=2, image_token_id=10, tie_word_embeddings=False,
    )  # fmt: skip


GLM_9B = {
    "vision_config": {
        "model_type": "glm4v_vision", "depth": 24, "hidden_size": 1536, "intermediate_size": 13696,
        "num_heads": 12, "out_hidden_size": 4096, "patch_size": 14, "image_size": 336,
    },
    "text_config": {
        "model_type": "glm4v_text", "vocab_size": 151552, "hidden_size": 4096,
        "intermediate_size": 13696, "num_hidden_layers": 40, "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12],
            "partial_rotary_factor": 0.5,
        },
    },
    "image_token_id": 151343, "tie_word_embeddings": False,
}  # fmt: skip


def _glm_41v_9b() -> Glm4vConfig:
    return Glm4vConfig(**GLM_9B)


def _glm_46v_flash_9b() -> Glm46VConfig:
    return Glm46VConfig(**GLM_9B)


def _llava_05b() -> LlavaConfig:
    """Returns LLaVA-1.5 over Qwen1.5-0.5B."""
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


def _smol() -> LlavaConfig:
    """Returns the embedded LLaVA over SmolLM2-135M-Instruct."""
    return LlavaConfig(
        vision_config=_tiny().vision_config,
        text_config=LlamaConfig(
            vocab_size=49153, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
            num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
        ),
        image_token_index=49152, image_seq_length=576, tie_word_embeddings=True,
    )  # fmt: skip


SHAPES: Registry[Callable[[], PreTrainedConfig]] = Registry(
    "model shape",
    {
        "llava-1.5-7b": _llava_7b,
        "llava-0.5b": _llava_05b,
        "llava-next-7b": _llava_next_7b,
        "llava-next-video-7b": _llava_next_video_7b,
        "llava-onevision-0.5b": _llava_onevision_05b,
        "qwen2.5-vl-3b": _qwen2_5_vl_3b,
        "qwen3-vl-2b": _qwen3_vl_2b,
        "internvl3-1b": _internvl3_1b,
        "smolvlm-256m": _smolvlm_256m,
        "qwen3-vl-30b-a3b": _qwen3_vl_30b_a3b,
        "idefics3-8b": _idefics3_8b,
        "gemma3-4b": _gemma3_4b,
        "gemma4-e2b": _gemma4_e2b,
        "mistral-small-3.1-24b": _mistral_small_31_24b,
        "glm-4.1v-9b": _glm_41v_9b,
        "glm-4.6v-flash-9b": _glm_46v_flash_9b,
        "qwen3.5-9b": _qwen3_5_9b,
        "qwen3.5-35b-a3b": _qwen3_5_35b_a3b,
        "tiny": _tiny,
        "smol": _smol,
    },
)
