"""The architecture, tokenizer and processor of the embedded LLaVA over SmolLM2, all real classes."""

from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionModel,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

IMAGE_TOKEN = "<image>"
# Writes a message's parts where SmolLM2's own template writes a string.
PARTS = (
    "{% macro parts(content) %}{% if content is string %}{{ content }}{% else %}"
    "{% for part in content %}{% if part['type'] == 'image' %}{{ '<image>\\n' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{% endmacro %}"
)


def smol_processor(folder: Path) -> LlavaProcessor:
    """Returns LLaVA's processor over SmolLM2's tokenizer, which learns the image's token.

    The chat template is SmolLM2's, where images may be parts of a message.

    Args:
        folder: of SmolLM2's tokenizer; `<image>` becomes its last token.
    """
    tokenizer = AutoTokenizer.from_pretrained(
        folder, extra_special_tokens={"image_token": IMAGE_TOKEN}, padding_side="left"
    )
    template = PARTS + tokenizer.chat_template.replace(
        "message['content']", "parts(message['content'])"
    )
    tokenizer.chat_template = None
    side = {"height": 336, "width": 336}
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 336}, crop_size=side),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def llava_over(
    language: LlamaForCausalLM, processor: LlavaProcessor, tower: CLIPVisionModel
) -> LlavaForConditionalGeneration:
    """Returns a LLaVA of a language model and a tower, copied; the projector is random.

    The image's token has the mean of all word embeddings, so that it is never the most likely one
    and takes less than its even share of the probability.

    Args:
        language: SmolLM2, whose word embeddings gain a row.
        processor: of `smol_processor`.
        tower: the vision tower.
    """
    vocabulary = len(processor.tokenizer)
    text_config = language.config
    text_config.vocab_size = vocabulary
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=text_config,
        image_token_index=processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=576,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    state = language.model.state_dict()
    words = state["embed_tokens.weight"]
    extra = words.mean(0, keepdim=True).expand(vocabulary - len(words), -1)
    state["embed_tokens.weight"] = torch.cat([words, extra])
    model.model.language_model.load_state_dict(state)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.tie_weights()
    ids = {
        key: getattr(text_config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    model.generation_config.update(**ids, do_sample=False, max_new_tokens=16)
    return model
