"""Tiny models built from the real classes; nothing is downloaded."""

import os
import sys
from importlib.metadata import version
from importlib.util import find_spec

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from packaging.version import Version
from PIL import Image

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported, by transformers

from tiny_families import NEEDS, OTHERS, SINCE, Tiny, is_quick

from vlm_prune.vlm.families import FAMILIES
from vlm_prune.vlm.tiny.config import make_model, make_processor


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Families that have much in common with others run few of the tests over all by default."""
    for item in items:
        given = getattr(item, "callspec", None)
        commands = item.path.match("benchmarks/test_families.py")
        if given is not None and not is_quick(item.originalname, given.params, commands):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def another_precision():
    """accelerate allows one precision per process: each test may choose its own."""
    yield
    if (state := sys.modules.get("accelerate.state")) is not None:
        state.AcceleratorState._reset_state(True)


@pytest.fixture(scope="session")
def processor():
    return make_processor(["USER: What color is the star? ASSISTANT: red", "Is there a 7? yes no"])


@pytest.fixture(scope="session")
def llava(processor):
    """A random 336 px LLaVA with 576 tokens per image, sharp enough that answers differ."""
    torch.manual_seed(0)
    model = make_model(processor, tower_width=48, width=48, layers=6).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    return model


@pytest.fixture(scope="session", params=[*FAMILIES, *OTHERS])
def tiny(request):
    """A random model of each family, and of some around other language models, and its processor."""
    for package in NEEDS.get(request.param, ()):
        if find_spec(package) is None:
            pytest.skip(f"the processor of {request.param} needs {package}")
    if Version(version("transformers")) < Version(SINCE.get(request.param, "0")):
        pytest.skip(f"{request.param} needs transformers {SINCE[request.param]}")
    return Tiny(request.param)


@pytest.fixture(scope="session")
def llava_tiny():
    """A random LLaVA with 25 tokens per image, and its processor."""
    return Tiny("llava")


@pytest.fixture(scope="session")
def images():
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).resize((336, 336), 0)
        for _ in range(3)
    ]


@pytest.fixture(scope="session")
def make_inputs(processor):
    """Build padded inputs from (number of images, question) per row."""

    def make(rows, pictures, side="left"):
        texts, used = [], []
        for count, question in rows:
            content = [{"type": "image"}] * count + [{"type": "text", "text": question}]
            message = [{"role": "user", "content": content}]
            texts.append(processor.apply_chat_template(message, add_generation_prompt=True))
            used += [pictures[(len(used) + i) % len(pictures)] for i in range(count)]
        processor.tokenizer.padding_side = side
        inputs = processor(text=texts, images=used or None, padding=True, return_tensors="pt")
        processor.tokenizer.padding_side = "left"
        return inputs

    return make
