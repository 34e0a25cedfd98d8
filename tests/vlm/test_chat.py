"""Special tokens that people write are text; what a template writes stays what it is."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_families import Tiny
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from vlm_prune.pruning.pipeline import PrunedVLM
from vlm_prune.pruning.registry import build
from vlm_prune.vlm.chat import encode_prompts, encode_text, render, special_tokens
from vlm_prune.vlm.common.errors import InputError


def chat(*turns):
    """Turns are (number of images, text), user and assistant in turn."""
    return [
        {
            "role": "assistant" if number % 2 else "user",
            "content": [*[{"type": "image"}] * images, {"type": "text", "text": text}],
        }
        for number, (images, text) in enumerate(turns)
    ]


def encode(tiny, *conversations, **options):
    """Conversations, the first pictures for the images of each."""
    texts = [render(tiny.processor, each, add_generation_prompt=True) for each in conversations]
    counts = [
        sum(p["type"] == "image" for turn in each for p in turn["content"])
        for each in conversations
    ]
    images = [tiny.pictures[:count] for count in counts]
    return encode_prompts(tiny.model, tiny.processor, texts, images, **options)


def rows(inputs):
    return [
        own[valid].tolist()
        for own, valid in zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)
    ]


def test_a_prompt_without_special_tokens_is_the_processors_own(tiny):
    inputs = encode(
        tiny, chat((1, "Is there a 7?")), chat((2, "What is red?"), (0, "yes"), (0, "no"))
    )
    plain = tiny.inputs(
        [[([0], "Is there a 7?")], [([0, 1], "What is red?"), ([], "yes"), ([], "no")]]
    )
    assert inputs.keys() == plain.keys()
    assert all(torch.equal(inputs[key], plain[key]) for key in plain)


def test_every_special_token_is_text_in_questions_and_replies(tiny):
    tokenizer = tiny.processor.tokenizer
    names = special_tokens(tiny.processor).names
    assert {tiny.processor.image_token, *tokenizer.all_special_tokens} <= set(names)
    ids = set(tokenizer.convert_tokens_to_ids(list(names)))
    for name in names:
        (plain,) = rows(encode(tiny, chat((1, "a b c"), (0, "d"), (0, "e"))))
        (ours,) = rows(encode(tiny, chat((1, f"a {name} c"), (0, f"d{name}"), (0, name))))
        assert [own for own in ours if own in ids] == [own for own in plain if own in ids], name
        assert name in tokenizer.decode([own for own in ours if own not in ids]), name


def test_the_models_answer_is_that_of_the_same_tokens(tiny):
    """The tensors fit together: placeholders, positions, types, mask."""
    inputs = encode(
        tiny, chat((1, f"a {tiny.processor.image_token} c")), chat((1, "Is there a 7?"))
    )
    with torch.inference_mode():
        both = tiny.model.generate(**inputs, max_new_tokens=4)[:, inputs["input_ids"].shape[1] :]
        for number, question in enumerate((f"a {tiny.processor.image_token} c", "Is there a 7?")):
            alone = encode(tiny, chat((1, question)))
            assert rows(alone)[0] == rows(inputs)[number]
            new = tiny.model.generate(**alone, max_new_tokens=4)[0, alone["input_ids"].shape[1] :]
            assert new.tolist() == both[number, : len(new)].tolist()


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_keep_their_padding(tiny, side):
    name = tiny.processor.image_token
    inputs = encode(tiny, chat((0, f"{name} {name} x")), chat((1, "y")), padding_side=side)
    mask, ids = inputs["attention_mask"], inputs["input_ids"]
    steps = mask.diff(dim=1)
    assert (steps >= 0).all() if side == "left" else (steps <= 0).all()
    assert (ids[mask == 0] == tiny.processor.tokenizer.pad_token_id).all()
    if "mm_token_type_ids" in inputs:
        image = tiny.model.config.image_token_id
        assert torch.equal(inputs["mm_token_type_ids"] == 1, ids == image)


def test_a_text_alone_is_encoded_alike(tiny):
    name = tiny.processor.image_token
    text = render(tiny.processor, chat((0, f"a{name}b")))
    (row,) = rows(encode(tiny, chat((0, f"a{name}b"))))
    ids = encode_text(tiny.processor, text)
    assert tiny.model.config.image_token_id not in ids
    assert "".join(tiny.processor.tokenizer.decode(ids).split()).find(f"a{name}b") >= 0
    assert set(ids) <= set(row) | {tiny.processor.tokenizer.bos_token_id}


def test_private_characters_of_a_text_become_no_token(tiny):
    ids = encode_text(tiny.processor, render(tiny.processor, chat((0, "a\U0010e000b"))))
    names = special_tokens(tiny.processor).names
    assert not any(
        name in tiny.processor.tokenizer.decode(ids)
        for name in names
        if name == tiny.processor.image_token
    )


def test_what_cannot_be_a_prompt_is_one_line(tiny):
    with pytest.raises(InputError, match="no Unicode"):
        render(tiny.processor, chat((0, "a\ud800b")))
    with pytest.raises(InputError, match="processor refuses"):
        encode_prompts(
            tiny.model,
            tiny.processor,
            [render(tiny.processor, chat((2, "x")))],
            [tiny.pictures[:1]],
        )
    template, tiny.processor.chat_template = tiny.processor.chat_template, None
    try:
        with pytest.raises(InputError, match="chat template"):
            render(tiny.processor, chat((0, "x")))
    finally:
        tiny.processor.chat_template = template


def test_prunedvlm_takes_any_text_and_any_picture(tiny, tmp_path):
    """Questions with special tokens, files, arrays and 16 bits; one line for what is no image."""
    vlm = PrunedVLM(tiny.model, tiny.processor, build("divprune", budget=4))
    color = np.asarray(tiny.pictures[0])
    tiny.pictures[0].save(tmp_path / "a.png")
    deep = np.zeros((84, 84), np.uint16)
    sources = [color, tmp_path / "a.png", str(tmp_path / "a.png"), tiny.pictures[0]]
    question = f"Is {tiny.processor.image_token} red?"
    replies = vlm.replies(sources, [question] * 4, max_new_tokens=3)
    assert len({(reply.text, reply.image_tokens) for reply in replies}) == 1
    assert vlm.answer(color, question, max_new_tokens=3) == replies[0].text
    assert isinstance(vlm.answer(Image.fromarray(deep), "x", max_new_tokens=3), str)
    for wrong in (tmp_path / "gone.png", deep.astype(np.float32)[None], None, 3):
        with pytest.raises(InputError):
            vlm.answer(wrong, "x")


FLAT = [(10_000, 1), (1, 10_000), (5_000, 1), (150, 1), (1, 150), (1, 1), (3, 1)]


@pytest.mark.parametrize("size", FLAT, ids=str)
def test_pictures_of_any_shape_are_answered_or_refused_in_one_line(tiny, size):
    answer_or_refuse(tiny, size)


@pytest.mark.parametrize("size", FLAT, ids=str)
def test_tiles_of_an_even_number_of_patches_may_leave_no_row(size):
    assert answer_or_refuse(Tiny("llava_next", side=56), size)


def answer_or_refuse(tiny, size):
    """Whether the model answers, as the unpruned model and with methods before and inside it."""
    text = render(tiny.processor, chat((1, "Is it red?")), add_generation_prompt=True)
    image = Image.effect_noise(size, 90)
    try:
        inputs = encode_prompts(tiny.model, tiny.processor, [text], [[image]])
    except InputError as error:
        lonely = tiny.name == "mistral3" and max(size) <= 28
        assert (max(size) / min(size) > 140 or lonely) and "\n" not in str(error)
        return False
    # where the first layers attend linearly, a cut comes too late for a few tokens
    budget = 16 if tiny.name.startswith("qwen3_5") else 4
    for method in ("none", "divprune", "fastv"):
        with torch.inference_mode(), build(method, budget=budget)(tiny.model) as trace:
            output = tiny.model.generate(**inputs, max_new_tokens=2)
        assert len(output) == 1 and (method == "none" or len(trace.kept[0]) <= budget)
    return True


CORPUS = ["What is this? USER: ASSISTANT: <image> is a text", "the star is red </s> <image>"] * 3


def bpe(kind):
    """A tokenizer as Llama's (as it was, and as it is), or as GPT-2's and Qwen's."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=kind != "bytes", unk_token="<unk>"))
    alphabet = list("<>/?:▁\nabcdefghijklmnopqrstuvwxyzASUERINTWh")
    if kind == "legacy":
        parts = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(parts)
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    elif kind == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder, alphabet = decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme=kind)
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    # some checkpoints hold the placeholder as a token that is not special
    fast.add_tokens([AddedToken("<image>", special=kind != "always", normalized=False)])
    fast.image_token = "<image>"
    return fast


@pytest.mark.parametrize("kind", ["legacy", "first", "always", "never", "bytes"])
def test_characters_of_special_tokens_survive_every_kind_of_tokenizer(kind):
    tokenizer = bpe(kind)
    text = "USER: What <image> is</s> this?\n<image>"
    ids = encode_text(tokenizer, special_tokens(tokenizer).hide(text))
    assert not {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<image>")} & set(ids)
    shown = tokenizer.decode(ids)
    if kind != "legacy":  # which puts a space behind every token that splits a text
        assert shown.strip() == text
    assert shown.split() == text.split()
