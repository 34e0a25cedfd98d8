"""The embedded model's architecture, tokenizer and processor, all real Hugging Face classes."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% else %} ASSISTANT: {% endif %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


def make_processor(corpus: Iterable[str], vocabulary: int = 512) -> LlavaProcessor:
    """Returns a processor: a byte-level BPE tokenizer learned from `corpus`, and
    CLIP's preprocessing at 336 px.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[*SPECIAL.values(), "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
        **SPECIAL,
    )
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
        ),
        tokenizer=fast,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(
    processor: LlavaProcessor, tower_width: int = 192, width: int = 256, layers: int = 7
) -> LlavaForConditionalGeneration:
    """Returns LLaVA-1.5's structure at about 9 M parameters, randomly initialized.

    Args:
        processor: whose tokenizer decides the vocabulary.
        tower_width: of the vision tower.
        width: of the language model.
        layers: of the language model.
    """
    tokenizer = processor.tokenizer
    ids = {
        key: tokenizer.convert_tokens_to_ids(SPECIAL[f"{key}_token"])
        for key in ("bos", "eos", "pad")
    }
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=tower_width,
            intermediate_size=4 * tower_width,
            projection_dim=tower_width,
            num_hidden_layers=6,
            num_attention_heads=max(2, tower_width // 32),
            image_size=336,
            patch_size=14,
            hidden_act="gelu",
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=688,
            num_hidden_layers=layers,
            attention_bias=True,
            num_attention_heads=max(2, width // 64),
            num_key_value_heads=max(2, width // 64),
            # slow rotation: a question finds what it names among 576 tokens by content
            rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            bos_token_id=ids["bos"],
            eos_token_id=ids["eos"],
            pad_token_id=ids["pad"],
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=576,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.update(
        bos_token_id=ids["bos"],
        eos_token_id=ids["eos"],
        pad_token_id=ids["pad"],
        do_sample=False,
        max_new_tokens=16,
    )
    return model
