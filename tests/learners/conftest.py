"""A LLaVA of 16 tokens per image over each supported language model, and prompts for it."""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image
from shaken import shake
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen3Config,
)

from vlm_prune.learners import WingsConfig, attach, detach

IMAGE, PAD, TOKENS = 5, 0, 16
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TEXTS = {
    "llama": (LlamaConfig, {"num_key_value_heads": 4}),
    "qwen2": (Qwen2Config, {"num_key_value_heads": 2}),
    "qwen3": (Qwen3Config, {"num_key_value_heads": 2, "head_dim": 16}),
}


def make_llava(text, vocabulary=64, image_token=IMAGE):
    torch.manual_seed(0)
    kind, more = TEXTS[text]
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            projection_dim=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=56,
            patch_size=14,
        ),
        text_config=kind(**SIZES, **more, vocab_size=vocabulary),
        image_token_index=image_token,
        image_seq_length=TOKENS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    model.generation_config.update(pad_token_id=PAD, suppress_tokens=[image_token])
    return model


@pytest.fixture(scope="session")
def build():
    return make_llava


@pytest.fixture(params=TEXTS)
def llava(request):
    return make_llava(request.param)


@pytest.fixture
def winged(llava):
    """Build from options: a model with learners that do something."""

    def make(**options):
        if getattr(llava, "wings", None) is not None:
            detach(llava)
        attach(llava, WingsConfig(**{"rank": 4, "max_positions": 128, **options}))
        shake(llava)
        return llava

    return make


@pytest.fixture(scope="session")
def prompts():
    """Rows from (images, text tokens before, between and after them); padded on the left."""

    def make(rows, seed=0, side="left"):
        ids, pixels = [], []
        for number, (images, text) in enumerate(rows):
            generator = torch.Generator().manual_seed(100 * seed + number)
            words = torch.randint(6, 64, (images + 1, text), generator=generator)
            row = [words[0]]
            for k in range(images):
                row += [torch.full((TOKENS,), IMAGE), words[k + 1]]
                pixels.append(torch.randn(3, 56, 56, generator=generator))
            ids.append(torch.cat(row))
        length = max(map(len, ids))
        padded = [
            torch.nn.functional.pad(
                row, (length - len(row), 0) if side == "left" else (0, length - len(row)), value=PAD
            )
            for row in ids
        ]
        inputs = {"input_ids": torch.stack(padded)}
        inputs["attention_mask"] = (inputs["input_ids"] != PAD).long()
        return inputs | ({"pixel_values": torch.stack(pixels)} if pixels else {})

    return make


@pytest.fixture(scope="session")
def processor_56(processor):
    """The embedded model's processor at 56 px, so that an image is 16 tokens."""
    small = copy.deepcopy(processor)
    small.image_processor.size = {"shortest_edge": 56}
    small.image_processor.crop_size = {"height": 56, "width": 56}
    return small


@pytest.fixture(scope="session")
def checkpoint(processor_56, tmp_path_factory):
    """A checkpoint folder of a random LLaVA."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = processor_56.tokenizer
    model = make_llava("llama", len(tokenizer), tokenizer.convert_tokens_to_ids("<image>"))
    model.save_pretrained(folder)
    processor_56.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def conversations(tmp_path_factory):
    """A LLaVA-format file of image and text-only samples, with its images."""
    folder = tmp_path_factory.mktemp("data")
    rng, entries = np.random.default_rng(0), []
    for n in range(6):
        Image.fromarray(rng.integers(0, 256, (60, 60, 3), np.uint8)).save(folder / f"{n}.png")
        turns = [("human", "<image>\nIs there a 7?"), ("gpt", "yes")]
        more = [("human", "What color is the star?"), ("gpt", "red")] if n % 2 else []
        entries.append({"id": str(n), "image": f"{n}.png", "conversations": turns + more})
        entries.append({"id": f"t{n}", "conversations": [("human", f"Is {n} red?"), ("gpt", "no")]})
    for entry in entries:
        entry["conversations"] = [{"from": who, "value": v} for who, v in entry["conversations"]]
    (folder / "data.json").write_text(json.dumps(entries))
    return folder
