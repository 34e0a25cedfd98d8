"""Tiny CLIPs of each supported make with random weights, and two synthetic tasks."""

import copy
from string import ascii_lowercase

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import CLIP, CustomTextCLIP
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
    Siglip2Config,
    Siglip2ImageProcessor,
    Siglip2Model,
    Siglip2Processor,
    Siglip2Tokenizer,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
)

from vlm_prune.continual.clip import from_hugging_face, from_open_clip
from vlm_prune.continual.streams.base import StreamTask

VISION = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
CONFIG = {"embed_dim": 32, "quick_gelu": True, "vision_cfg": VISION, "text_cfg": TEXT}
WORDS = ["a", "photo", "of", ".", "sharp", "red", "green", "blue", "disc", "bar", "ring"]


TOKENIZE = open_clip.SimpleTokenizer(context_length=16)


def shake(model):
    """Make every weight count: random biases, norms and embeddings too."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("logit"):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.1 * noise)
    return model.eval()


def make_open_clip(**vision):
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIG)
    config["vision_cfg"].update(vision)
    return from_open_clip(shake(CLIP(**copy.deepcopy(config))), TOKENIZE, config)


def make_timm():
    torch.manual_seed(0)
    vision = {
        "timm_model_name": "test_vit",
        "timm_model_pretrained": False,
        "timm_pool": "token",
        "timm_proj": "linear",
        "image_size": 160,
    }
    config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": dict(TEXT)}
    model = shake(CustomTextCLIP(**copy.deepcopy(config)))
    return from_open_clip(model, TOKENIZE, config | {"custom_text": True})


def make_word_tokenizer():
    vocabulary = {word: n for n, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def make_hugging_face():
    torch.manual_seed(0)
    fast = make_word_tokenizer()
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    size |= {"num_attention_heads": 2}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    text = size | ids | {"vocab_size": len(fast), "max_position_embeddings": 16}
    vision = size | {"image_size": 32, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32))
    pictures = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return from_hugging_face(shake(model), CLIPProcessor(pictures, fast))


def make_open_clip_siglip():
    """The settings of open_clip's SigLIP 2 models, at small widths."""
    torch.manual_seed(0)
    vision = {
        "timm_model_name": "test_vit",
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
        "image_size": 160,
    }
    text = TEXT | {
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
        "norm_kwargs": {"eps": 1e-6},
        "act_kwargs": {"approximate": "tanh"},
    }
    config = {"embed_dim": 64, "init_logit_bias": -10, "vision_cfg": vision, "text_cfg": text}
    model = shake(CustomTextCLIP(**copy.deepcopy(config)))
    return from_open_clip(model, TOKENIZE, config | {"custom_text": True})


def make_siglip(kind):
    """Hugging Face's SigLIP, or the SigLIP 2 that takes images of many shapes."""
    torch.manual_seed(0)
    letters = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", ".", *ascii_lowercase]
    numbered = {letter: n for n, letter in enumerate(letters)}
    fast = make_word_tokenizer() if kind == "siglip" else Siglip2Tokenizer(numbered, [])
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    size |= {"num_attention_heads": 2}
    text = size | {"vocab_size": len(fast), "max_position_embeddings": 24, "projection_size": 32}
    vision = size | {"patch_size": 8}
    if kind == "siglip":
        config = SiglipConfig(text_config=text, vision_config=vision | {"image_size": 32})
        pictures = SiglipImageProcessor(size={"height": 32, "width": 32})
        model, processor = SiglipModel(config), SiglipProcessor(pictures, fast)
    else:
        config = Siglip2Config(text_config=text, vision_config=vision | {"num_patches": 16})
        pictures = Siglip2ImageProcessor(patch_size=8, max_num_patches=16)
        model, processor = Siglip2Model(config), Siglip2Processor(pictures, fast)
    with torch.no_grad():
        model.logit_scale.fill_(4.7)
        model.logit_bias.fill_(-12.0)
    return from_hugging_face(shake(model), processor)


MAKES = {
    "open_clip": make_open_clip,
    "custom attention": lambda: make_open_clip(block_type="custom", qk_norm=True, scale_heads=True),
    "timm": make_timm,
    "hugging face": make_hugging_face,
    "open_clip siglip": make_open_clip_siglip,
    "siglip": lambda: make_siglip("siglip"),
    "siglip 2": lambda: make_siglip("siglip2"),
}


@pytest.fixture(params=MAKES)
def any_clip(request):
    return MAKES[request.param]()


@pytest.fixture
def clip():
    return make_open_clip()


@pytest.fixture
def make_clip():
    return make_open_clip


def pictures(classes, count, seed):
    """Noise over a color per class, so that a few steps of training learn it."""
    rng, rows = np.random.default_rng(seed), []
    for n in range(count):
        label = n % len(classes)
        pixels = rng.integers(0, 90, (32, 32, 3))
        pixels[..., label] += 150
        rows.append((Image.fromarray(pixels.astype(np.uint8)), label))
    return rows


def make_task(name, classes, seed):
    splits = [pictures(classes, n, [seed, k]) for k, n in enumerate((9, 3, 6))]
    return StreamTask(name, classes, ("a photo of a {}.", "a sharp {}."), *splits)


@pytest.fixture(scope="session")
def tasks():
    return [make_task("colours", ("red", "green", "blue"), 0),
            make_task("shapes", ("disc", "bar", "ring"), 1)]  # fmt: skip


@pytest.fixture(scope="session")
def references():
    return [image for image, _ in pictures(("x", "y", "z"), 6, 9)]


@pytest.fixture
def word_tokenizer():
    return make_word_tokenizer()


@pytest.fixture
def batch(any_clip):
    """Pixels and token ids for a CLIP."""
    side = any_clip.eval_transform(Image.new("RGB", (40, 40))).shape[-1]
    pixels = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(1))
    return pixels, any_clip.tokenize(["a photo of a red disc", "a bar.", "a green ring."])
