"""A tiny random model and its processor for each family, from the real classes, and its state."""

import copy
from contextlib import contextmanager
from functools import partial
from itertools import chain

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from transformers.video_utils import VideoMetadata

from vlm_prune.pruning import VideoPruner
from vlm_prune.vlm.families import family_of
from vlm_prune.vlm.tiny.config import CHAT_TEMPLATE, SPECIAL, make_processor

HEAD, LAYERS = 16, 4
WIDTH = 2 * HEAD
MROPE = [HEAD // 8, 3 * HEAD // 16, 3 * HEAD // 16]
CORPUS = ["USER: What color is the star? ASSISTANT: red", "Is there a 7? yes no green blue"]
PICTURES = [(84, 84), (42, 84), (126, 60), (84, 84)]  # width, height
CLIPS = {"a": (6, (84, 84)), "b": (4, (84, 56)), "c": (6, (84, 84))}  # frames, size
FPS = 2.0


def tokenizer_with(**tokens):
    base = make_processor(CORPUS, 300).tokenizer
    base.add_special_tokens({"additional_special_tokens": list(tokens.values())})
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=base.backend_tokenizer, padding_side="left",
        extra_special_tokens=tokens, **SPECIAL,
    )  # fmt: skip


def template(image, video=None):
    own = CHAT_TEMPLATE.replace("<image>", image)
    if video is None:
        return own
    return own.replace(
        "{% else %}{{ part", f"{{% elif part['type'] == 'video' %}}{video}\n{{% else %}}{{{{ part"
    )


def text_of(tokenizer, **more):
    return dict(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=48,
        num_hidden_layers=LAYERS, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=1024, tie_word_embeddings=False,
        **{f"{k}_token_id": tokenizer.convert_tokens_to_ids(SPECIAL[f"{k}_token"])
           for k in ("bos", "eos", "pad")},
    ) | more  # fmt: skip


def vit(**more):
    return dict(
        hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, **more
    )


def token_id(tokenizer, token):
    return tokenizer.convert_tokens_to_ids(token)


def llava(vision=hf.CLIPVisionConfig, text=hf.LlamaConfig, **more):
    """Another tower, decoder or configuration may be given."""
    tokenizer, has_cls = tokenizer_with(image_token="<image>"), vision is hf.CLIPVisionConfig
    strategy = "default" if has_cls else "full"
    config = hf.LlavaConfig(
        vision_config=vision(**vit(image_size=70, patch_size=14)),
        text_config=text(**text_of(tokenizer)),
        image_token_index=token_id(tokenizer, "<image>"), image_seq_length=25,
        **{"vision_feature_select_strategy": strategy} | more,
    )  # fmt: skip
    processor = hf.LlavaProcessor(
        hf.CLIPImageProcessor(size={"shortest_edge": 70}, crop_size={"height": 70, "width": 70}),
        tokenizer, patch_size=14, vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(has_cls), chat_template=template("<image>"),
    )  # fmt: skip
    return hf.LlavaForConditionalGeneration(config), processor


def tiles(side):
    return {
        "size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side},
        "image_grid_pinpoints": [[side, 2 * side], [2 * side, side], [2 * side, 2 * side]],
    }  # fmt: skip


TILES = tiles(42)


def llava_next(side=42, **more):
    tokenizer = tokenizer_with(image_token="<image>")
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**vit(image_size=side, patch_size=14)),
        text_config=hf.LlamaConfig(**text_of(tokenizer)),
        image_token_index=token_id(tokenizer, "<image>"),
        image_grid_pinpoints=tiles(side)["image_grid_pinpoints"], **more,
    )  # fmt: skip
    processor = hf.LlavaNextProcessor(
        hf.LlavaNextImageProcessor(**tiles(side)), tokenizer, patch_size=14,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=template("<image>"),
    )  # fmt: skip
    return hf.LlavaNextForConditionalGeneration(config), processor


def llava_next_video():
    tokenizer = tokenizer_with(image_token="<image>", video_token="<video>")
    config = hf.LlavaNextVideoConfig(
        vision_config=hf.CLIPVisionConfig(**vit(image_size=56, patch_size=14)),
        text_config=hf.LlamaConfig(**text_of(tokenizer)),
        image_token_index=token_id(tokenizer, "<image>"),
        video_token_index=token_id(tokenizer, "<video>"),
        image_grid_pinpoints=tiles(56)["image_grid_pinpoints"],
    )
    processor = hf.LlavaNextVideoProcessor(
        hf.LlavaNextVideoVideoProcessor(
            size={"height": 56, "width": 56}, crop_size={"height": 56, "width": 56}
        ),
        hf.LlavaNextImageProcessor(**tiles(56)), tokenizer, patch_size=14,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=template("<image>", "<video>"),
    )  # fmt: skip
    return hf.LlavaNextVideoForConditionalGeneration(config), processor


def llava_onevision():
    tokenizer = tokenizer_with(image_token="<image>", video_token="<video>")
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(
            **vit(image_size=42, patch_size=14, vision_use_head=False)
        ),
        text_config=hf.Qwen2Config(**text_of(tokenizer)),
        image_token_index=token_id(tokenizer, "<image>"),
        video_token_index=token_id(tokenizer, "<video>"),
        image_grid_pinpoints=TILES["image_grid_pinpoints"],
        vision_aspect_ratio="anyres_max_2",
    )
    processor = hf.LlavaOnevisionProcessor(
        hf.LlavaOnevisionImageProcessor(
            size={"height": 42, "width": 42}, image_grid_pinpoints=TILES["image_grid_pinpoints"]
        ),
        tokenizer, hf.LlavaOnevisionVideoProcessor(size={"height": 42, "width": 42}),
        num_image_tokens=9, vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_2", chat_template=template("<image>", "<video>"),
    )  # fmt: skip
    return hf.LlavaOnevisionForConditionalGeneration(config), processor


def qwen_tokenizer():
    return tokenizer_with(
        image_token="<|image_pad|>", video_token="<|video_pad|>",
        vision_start_token="<|vision_start|>", vision_end_token="<|vision_end|>",
    )  # fmt: skip


QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
QWEN_VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"


def qwen_ids(tokenizer):
    return {
        "image_token_id": token_id(tokenizer, "<|image_pad|>"),
        "video_token_id": token_id(tokenizer, "<|video_pad|>"),
        "vision_start_token_id": token_id(tokenizer, "<|vision_start|>"),
        "vision_end_token_id": token_id(tokenizer, "<|vision_end|>"),
    }


def qwen_frames(patch, frames):
    """Frames of 2 x 3 to 3 x 3 tokens; `frames` is the number that the sizes count."""
    size = {"shortest_edge": frames * 56 * 84, "longest_edge": frames * 84 * 84}
    return {"size": size, "patch_size": patch, "merge_size": 2, "temporal_patch_size": 2,
            "cap_pixels_per_frame": False}  # fmt: skip


def qwen_pixels(patch):
    size = {"shortest_edge": 112 * 112, "longest_edge": 168 * 168}
    return {"size": size, "patch_size": patch, "merge_size": 2, "temporal_patch_size": 2}


def qwen2_5_vl():
    tokenizer = qwen_tokenizer()
    config = hf.Qwen2_5_VLConfig(
        vision_config={
            "depth": 3, "hidden_size": WIDTH, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": WIDTH,
            "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [2],
        },
        text_config=text_of(
            tokenizer,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": MROPE},
        ),
        tie_word_embeddings=False, **qwen_ids(tokenizer),
    )  # fmt: skip
    processor = hf.Qwen2_5_VLProcessor(
        hf.Qwen2VLImageProcessor(**qwen_pixels(14)), tokenizer,
        hf.Qwen2VLVideoProcessor(**qwen_frames(14, 1)),
        chat_template=template(QWEN_IMAGE, QWEN_VIDEO),
    )  # fmt: skip
    return hf.Qwen2_5_VLForConditionalGeneration(config), processor


def qwen3_vl(config_class=hf.Qwen3VLConfig, model_class=hf.Qwen3VLForConditionalGeneration, **text):
    tokenizer = qwen_tokenizer()
    config = config_class(
        vision_config={
            "depth": 3, "hidden_size": WIDTH, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": WIDTH,
            "patch_size": 14, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1],
        },
        text_config=text_of(
            tokenizer, head_dim=HEAD,
            rope_parameters={
                "rope_type": "default", "rope_theta": 1e4, "mrope_section": MROPE,
                "mrope_interleaved": True,
            }, **text,
        ),
        tie_word_embeddings=False, **qwen_ids(tokenizer),
    )  # fmt: skip
    processor = hf.Qwen3VLProcessor(
        hf.Qwen2VLImageProcessor(**qwen_pixels(14)), tokenizer,
        hf.Qwen3VLVideoProcessor(**qwen_frames(14, 6)),
        chat_template=template(QWEN_IMAGE, QWEN_VIDEO),
    )  # fmt: skip
    return model_class(config), processor


EXPERTS = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}


LINEAR = {
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}  # fmt: skip


def qwen3_5(config_class=hf.Qwen3_5Config, model_class=hf.Qwen3_5ForConditionalGeneration, **text):
    tokenizer = qwen_tokenizer()
    config = config_class(
        vision_config={
            "depth": 3, "hidden_size": WIDTH, "intermediate_size": 48, "num_heads": 2,
            "out_hidden_size": WIDTH, "patch_size": 14, "num_position_embeddings": 64,
        },
        text_config=text_of(
            tokenizer, head_dim=HEAD, num_hidden_layers=2 * LAYERS, full_attention_interval=2,
            **LINEAR, rms_norm_eps=1e-2,  # heads of 8 may be all but zero
            rope_parameters={
                "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
                "mrope_section": [1, 1, 2], "mrope_interleaved": True,
            }, **text,
        ),
        tie_word_embeddings=False, **qwen_ids(tokenizer),
    )  # fmt: skip
    processor = hf.Qwen3VLProcessor(
        hf.Qwen2VLImageProcessor(**qwen_pixels(14)), tokenizer, hf.Qwen3VLVideoProcessor(),
        chat_template=template(QWEN_IMAGE),
    )  # fmt: skip
    return model_class(config), processor


def qwen3_5_moe():
    experts = EXPERTS | {"shared_expert_intermediate_size": 24}
    return qwen3_5(hf.Qwen3_5MoeConfig, hf.Qwen3_5MoeForConditionalGeneration, **experts)


def qwen3_vl_moe():
    return qwen3_vl(hf.Qwen3VLMoeConfig, hf.Qwen3VLMoeForConditionalGeneration, **EXPERTS)


def internvl(text=hf.Qwen2Config):
    tokenizer = tokenizer_with(
        start_image_token="<img>", end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>", video_token="<video>",
    )  # fmt: skip
    config = hf.InternVLConfig(
        vision_config=vit(image_size=[84, 84], patch_size=[14, 14], norm_type="layer_norm"),
        text_config=text(**text_of(tokenizer)),
        image_token_id=token_id(tokenizer, "<IMG_CONTEXT>"), image_seq_length=9,
    )  # fmt: skip
    processor = hf.InternVLProcessor(
        hf.GotOcr2ImageProcessor(size={"height": 84, "width": 84}, min_patches=1, max_patches=2),
        tokenizer, hf.InternVLVideoProcessor(size={"height": 84, "width": 84}),
        image_seq_length=9, chat_template=template("<IMG_CONTEXT>", "<video>"),
    )  # fmt: skip
    return hf.InternVLForConditionalGeneration(config), processor


def smolvlm():
    markers = {f"row_{r}_col_{c}": f"<row_{r}_col_{c}>" for r in (1, 2, 3) for c in (1, 2, 3)}
    tokenizer = tokenizer_with(
        image_token="<image>", fake_image_token="<fake_token_around_image>",
        global_image_token="<global-img>", end_of_utterance_token="<end_of_utterance>",
        video_token="<video>", **markers,
    )  # fmt: skip
    config = hf.SmolVLMConfig(
        vision_config=vit(image_size=48, patch_size=8),
        text_config=hf.LlamaConfig(**text_of(tokenizer)), scale_factor=2,
        image_token_id=token_id(tokenizer, "<image>"), tie_word_embeddings=False,
        pad_token_id=token_id(tokenizer, "<pad>"),
    )  # fmt: skip
    processor = hf.SmolVLMProcessor(
        hf.SmolVLMImageProcessor(size={"longest_edge": 96}, max_image_size={"longest_edge": 48}),
        tokenizer,
        hf.SmolVLMVideoProcessor(size={"longest_edge": 96}, max_image_size={"longest_edge": 48}),
        image_seq_len=9, chat_template=template("<image>", "<video>"),
    )  # fmt: skip
    return hf.SmolVLMForConditionalGeneration(config), processor


def idefics3():
    markers = [f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)]
    named = {f"marker_{number}": marker for number, marker in enumerate(markers)}
    tokenizer = tokenizer_with(
        image_token="<image>", fake_image_token="<fake_token_around_image>",
        global_image_token="<global-img>", end_of_utterance_token="<end_of_utterance>", **named,
    )  # fmt: skip
    config = hf.Idefics3Config(
        vision_config=vit(image_size=48, patch_size=8),
        text_config=hf.LlamaConfig(**text_of(tokenizer)), scale_factor=2,
        image_token_id=token_id(tokenizer, "<image>"), tie_word_embeddings=False,
        pad_token_id=token_id(tokenizer, "<pad>"),
    )  # fmt: skip
    processor = hf.Idefics3Processor(
        hf.Idefics3ImageProcessor(size={"longest_edge": 96}, max_image_size={"longest_edge": 48}),
        tokenizer, image_seq_len=9, chat_template=template("<image>"),
    )  # fmt: skip
    return hf.Idefics3ForConditionalGeneration(config), processor


def gemma3():
    tokenizer = tokenizer_with(
        boi_token="<start_of_image>", eoi_token="<end_of_image>",
        image_token="<image_soft_token>",
    )  # fmt: skip
    config = hf.Gemma3Config(
        vision_config=hf.SiglipVisionConfig(
            **vit(image_size=70, patch_size=7, vision_use_head=False)
        ),
        text_config=hf.Gemma3TextConfig(
            **text_of(tokenizer, head_dim=HEAD, query_pre_attn_scalar=HEAD, sliding_window=21),
            layer_types=[("sliding_attention", "full_attention")[n % 2] for n in range(LAYERS)],
        ),
        mm_tokens_per_image=25, image_token_id=token_id(tokenizer, "<image_soft_token>"),
        boi_token_index=token_id(tokenizer, "<start_of_image>"),
        eoi_token_index=token_id(tokenizer, "<end_of_image>"), tie_word_embeddings=False,
    )  # fmt: skip
    processor = hf.Gemma3Processor(
        hf.Gemma3ImageProcessor(size={"height": 70, "width": 70}), tokenizer,
        image_seq_length=25, chat_template=template("<start_of_image>"),
    )  # fmt: skip
    return hf.Gemma3ForConditionalGeneration(config), processor


def mistral3():
    tokens = {"image": "[IMG]", "break": "[IMG_BREAK]", "end": "[IMG_END]"}
    tokenizer = tokenizer_with(**{f"image_{name}_token": own for name, own in tokens.items()})
    config = hf.Mistral3Config(
        vision_config=hf.PixtralVisionConfig(**vit(image_size=126, patch_size=7, head_dim=HEAD)),
        text_config=hf.MistralConfig(
            **text_of(tokenizer, head_dim=HEAD, sliding_window=None)
        ),
        spatial_merge_size=2, image_token_id=token_id(tokenizer, "[IMG]"),
        tie_word_embeddings=False,
    )  # fmt: skip
    processor = hf.PixtralProcessor(
        hf.PixtralImageProcessor(size={"longest_edge": 126}, patch_size=7), tokenizer,
        patch_size=7, spatial_merge_size=2, chat_template=template("[IMG]"),
    )  # fmt: skip
    return hf.Mistral3ForConditionalGeneration(config), processor


GLM_IMAGE = "<|begin_of_image|><|image|><|end_of_image|>"


def glm4v(
    config_class=hf.Glm4vConfig, model_class=hf.Glm4vForConditionalGeneration,
    processor_class=hf.Glm4vProcessor, image_processor=hf.Glm4vImageProcessor,
    video_processor=hf.Glm4vVideoProcessor,
):  # fmt: skip
    names = ("begin_of_image", "end_of_image", "begin_of_video", "end_of_video")
    tokenizer = tokenizer_with(
        image_token="<|image|>", video_token="<|video|>",
        **{f"{name}_token": f"<|{name}|>" for name in names},
    )  # fmt: skip
    ids = {
        f"{kind}_{end}_token_id": token_id(tokenizer, f"<|{name}_of_{kind}|>")
        for kind in ("image", "video") for end, name in (("start", "begin"), ("end", "end"))
    }  # fmt: skip
    text = text_of(
        tokenizer,
        rope_parameters={
            "rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2],
            "partial_rotary_factor": 0.5,
        },
    )  # fmt: skip
    config = config_class(
        vision_config={
            "model_type": "glm4v_vision", "depth": 3, "hidden_size": WIDTH, "intermediate_size": 48,
            "num_heads": 2, "out_hidden_size": WIDTH, "patch_size": 14, "image_size": 84,
        },
        text_config=text | {"model_type": "glm4v_text"}, tie_word_embeddings=False,
        image_token_id=token_id(tokenizer, "<|image|>"),
        video_token_id=token_id(tokenizer, "<|video|>"), **ids,
    )  # fmt: skip
    processor = processor_class(
        image_processor(**qwen_pixels(14)), tokenizer, video_processor(),
        chat_template=template(GLM_IMAGE),
    )  # fmt: skip
    return model_class(config), processor


def glm46v():
    return glm4v(
        hf.Glm46VConfig, hf.Glm46VForConditionalGeneration, hf.Glm46VProcessor,
        hf.Glm46VImageProcessor, hf.Glm46VVideoProcessor,
    )  # fmt: skip


def gemma4(**text):
    names = ("boi", "eoi", "boa", "eoa", "image", "audio")
    tokenizer = tokenizer_with(
        **{f"{name}_token": f"<|{name}|>" for name in names}, video_token="<|video|>"
    )
    ids = {
        f"{name}_token_id": token_id(tokenizer, f"<|{name}|>")
        for name in (*names, "video")
        if name != "eoa"
    }
    config = hf.Gemma4Config(
        vision_config=vit(
            patch_size=2, position_embedding_size=1024, head_dim=HEAD, num_key_value_heads=2
        ),
        text_config=hf.Gemma4TextConfig(
            **text_of(
                tokenizer, head_dim=HEAD, global_head_dim=HEAD, sliding_window=21,
                hidden_size_per_layer_input=8, vocab_size_per_layer_input=len(tokenizer),
                layer_types=[("sliding_attention", "full_attention")[n % 2] for n in range(LAYERS)],
            )
            | {"use_bidirectional_attention": "vision"} | text
        ),
        tie_word_embeddings=False, **ids,
    )  # fmt: skip
    processor = hf.Gemma4Processor(
        hf.Gemma4AudioFeatureExtractor(), hf.Gemma4ImageProcessor(patch_size=2, max_soft_tokens=70),
        tokenizer, hf.Gemma4VideoProcessor(), chat_template=template("<|image|>"),
    )  # fmt: skip
    return hf.Gemma4ForConditionalGeneration(config), processor


def gemma4_sharing():
    """As the smaller models: causal, and the last layers use keys and values of others."""
    return gemma4(use_bidirectional_attention=None, num_kv_shared_layers=1)


def internvl3_5():
    return internvl(partial(hf.Qwen3Config, head_dim=HEAD))


def internvl3_5_moe():
    return internvl(partial(hf.Qwen3MoeConfig, head_dim=HEAD, **EXPERTS))


def llava_qwen3():
    return llava(text=partial(hf.Qwen3Config, head_dim=HEAD))


OTHERS = ("gemma4_sharing", "internvl3_5", "internvl3_5_moe", "llava_qwen3")
"""Models of these families around other language models."""
MAKERS = {
    maker.__name__: maker
    for maker in (
        llava, llava_next, llava_next_video, llava_onevision, qwen2_5_vl, qwen3_vl, internvl, smolvlm,
        qwen3_vl_moe, idefics3, gemma3, mistral3, glm4v, glm46v,
        qwen3_5, qwen3_5_moe, internvl3_5, internvl3_5_moe, llava_qwen3,
        gemma4, gemma4_sharing,
    )
}  # fmt: skip


NEEDS = {
    "gemma4": ("torchvision",),
    "gemma4_sharing": ("torchvision",),
    "internvl3_5": ("torchvision",),
    "internvl3_5_moe": ("torchvision",),
    "llava_next_video": ("torchvision",),
    "llava_onevision": ("torchvision",),
    "qwen2_5_vl": ("torchvision",),
    "qwen3_vl": ("torchvision",),
    "internvl": ("torchvision",),
    "smolvlm": ("torchvision", "num2words"),
    "qwen3_vl_moe": ("torchvision",),
    "idefics3": ("torchvision",),
    "gemma3": ("torchvision",),
    "mistral3": ("torchvision",),
    "glm4v": ("torchvision",),
    "glm46v": ("torchvision",),
    "qwen3_5": ("torchvision",),
    "qwen3_5_moe": ("torchvision",),
}

SINCE = {"smolvlm": "5.21", "idefics3": "5.21"}
"""The transformers that a family needs, where it is newer than the oldest one."""


CORE = (
    "llava", "llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm",
)  # fmt: skip
"""Families that every test runs on by default."""
QUICK = {
    "test_features_projected_are_what_the_language_model_gets",
    "test_attention_received_is_that_of_the_towers_maps",
    "test_the_tower_s_flops_are_those_that_it_spends_on_each_picture",
    "test_keeping_all_equals_the_unpruned_model[cdpruner]",
    "test_the_budget_is_met_and_the_model_is_untouched_afterward[zoo]",
    "test_each_row_equals_its_solo_run[divprune+adaptinfer]",
    "test_each_row_equals_its_solo_run[visionzip]",
    "test_cached_decoding_equals_a_full_forward[divprune+adaptinfer]",
    "test_pruned_costs_are_those_of_the_pruned_forward[divprune]",
}
"""What the others run by default, with the method's name; `-m slow` runs the rest."""


COMMANDS = ("llava", "llava_onevision", "qwen3_vl", "internvl")
"""Families that whole commands run on by default."""


def is_quick(test, params, commands=False):
    """Whether a test with these parameters may run by default, as far as its family decides.

    Args:
        test: its name.
        params: its parameters.
        commands: whether it runs whole commands.
    """
    family, method = params.get("tiny"), params.get("name")
    return (
        not isinstance(family, str)
        or family in (COMMANDS if commands else CORE)
        or (test if method is None else f"{test}[{method}]") in QUICK
    )


def picture(draw, size):
    """Blocks of color, with noise: rounding would choose between patches that are equal."""
    blocks = Image.fromarray(draw.integers(32, 224, (6, 6, 3), np.uint8)).resize(size, 0)
    return Image.fromarray(blocks + draw.integers(0, 32, (*size[::-1], 3), np.uint8))


class Tiny:
    """A model, its processor, and prompts with pictures of several sizes."""

    def __init__(self, name, **options):
        torch.manual_seed(0)
        self.model, self.processor = MAKERS[name](**options)
        self.name = self.model.config.model_type
        self.model.eval()
        with torch.no_grad():  # sharp enough that tokens matter
            for part, parameter in self.model.named_parameters():
                # some norms multiply with 1 + weight, which is 0 at first
                offset = part.endswith("weight") and not parameter.any()
                parameter.copy_(torch.randn_like(parameter) * (0.2 if parameter.ndim > 1 else 0.02))
                if parameter.ndim == 1 and not offset:
                    parameter.add_(1)
            for module in self.model.modules():
                # attention without a scale has it in its norm of queries
                if hasattr(module, "q_norm") and getattr(module, "scaling", 0) == 1:
                    module.q_norm.weight.mul_(module.head_dim**-0.5)
        tokenizer = self.processor.tokenizer
        self.model.generation_config.update(
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
            do_sample=False,
        )  # fmt: skip
        draw = np.random.default_rng(0)
        self.pictures = [picture(draw, size) for size in PICTURES]
        self.clips = {
            name: np.stack([np.asarray(picture(draw, size)) for _ in range(frames)])
            for name, (frames, size) in CLIPS.items()
        }

    def inputs(self, rows, side="left", **options):
        """Rows are lists of turns; a turn is pictures by number, clips by letter, and text."""
        texts, images, clips = [], [], []
        for turns in rows:
            chat = []
            for number, (pictures, text) in enumerate(turns):
                shown = [{"type": "video" if p in self.clips else "image"} for p in pictures]
                content = [*shown, {"type": "text", "text": text}]
                chat.append({"role": "assistant" if number % 2 else "user", "content": content})
            texts.append(self.processor.apply_chat_template(chat, add_generation_prompt=True))
            used = [p for pictures, _ in turns for p in pictures]
            images.append([self.pictures[p] for p in used if p not in self.clips])
            clips += [self.clips[p] for p in used if p in self.clips]
        if not family_of(self.model).by_row:
            images = list(chain.from_iterable(images))
        images = images if any(images) else None
        if clips:
            options = {
                "videos": clips, "do_sample_frames": False,
                "video_metadata": [
                    VideoMetadata(len(clip), FPS, frames_indices=list(range(len(clip))))
                    for clip in clips
                ],
            } | options  # fmt: skip
        self.processor.tokenizer.padding_side = side
        out = self.processor(
            text=texts, images=images, padding=True, padding_side=side, return_tensors="pt",
            **options,
        )  # fmt: skip
        self.processor.tokenizer.padding_side = "left"
        return out

    def frames(self, rows):
        """What a pruner is told of the videos of such rows, where their frames are images."""
        if not family_of(self.model).frames_as_images:
            return {}
        shown = [p for turns in rows for pictures, _ in turns for p in pictures]
        return {"video_frames": [len(self.clips.get(p, ())) for p in shown]}

    def encode(self, inputs, **frames):
        """The images of these inputs, through tower and projector."""
        family = family_of(self.model)
        names = ("pixel_values", "pixel_values_videos", "input_ids")
        names += family.image_inputs + family.video_inputs
        return family.encode(**{name: inputs[name] for name in names if name in inputs}, **frames)


def refused_on_images(method, model):
    """Whether a method does not go with images of a model: it lacks something, or the method compares
    frames, and these are images to the model.
    """
    family = family_of(model)
    lacking = method.needs_on(len(family.decoder.layers)) & family.lacks
    return bool(lacking) or ("videos" in method.needs and family.frames_as_images)


def leaves_images(method, model):
    """Whether images stay whole: the method compares frames, or shrinks no tiles."""
    tiles = method.stage == "input" and model.config.model_type == "llava_onevision"
    return tiles or isinstance(method, VideoPruner)


def rounding(tiny):
    """How far logits may differ where padding, or a state, moves the chunks that linear attention adds up."""
    linear = "linear_attention" in (
        getattr(tiny.model.config.get_text_config(), "layer_types", None) or ()
    )
    return 1e-4 if linear else 2e-5


def snapshot(model):
    """What a block must leave as it was: hooks, attributes (functions by identity), configurations.

    Values of other attributes are the model's own, such as Qwen's offset of positions.
    """
    return (
        {
            name: (
                list(module._forward_pre_hooks),
                list(module._forward_hooks),
                {key: callable(value) and id(value) for key, value in vars(module).items()},
            )
            for name, module in model.named_modules()
        },
        copy.deepcopy(model.config.to_dict()),
        copy.deepcopy(vars(model.generation_config)),
    )


def restored(sizes, rotary, prompt):
    """What RESTORE adds to the attention of a row, (n, n), by its equations.

    Args:
        sizes: tokens that each one stands for, (n,).
        rotary: cosines and sines of each token's rotation, (1, n, d) each.
        prompt: tokens of the prompt.
    """
    cos, sin = rotary
    angles, bias = torch.atan2(sin, cos)[0].double(), torch.zeros(len(sizes), len(sizes))
    for query, own in enumerate(angles):
        decay = (own - angles).cos().mean(1)
        bias[query] = sizes.log() + (2 - decay).log() * (query < prompt)
    return bias


@contextmanager
def failing(module):
    """A module that fails when it is called, and the error that this raises."""

    def fail(*_):
        raise RuntimeError("inside")

    hook = module.register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="inside"):
            yield
    finally:
        hook.remove()


def same_choices(one, other, counts, others=0):
    """For each row, of `counts` images, whether both runs kept the same tokens.

    Of an image at most `others` tokens may differ: on random weights some are all but alike, and
    rounding decides between them.
    """
    differing = [
        len(set(ours.tolist()) - set(theirs.tolist()))
        for ours, theirs in zip(one, other, strict=True)
    ]
    assert max(differing) <= others
    images = iter(differing)
    return [sum(next(images) for _ in range(count)) == 0 for count in counts]
