"""The packaged video model: put together from small files, a real LLaVA-OneVision, and it sees."""

import pytest
import torch
from transformers import LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor

from vlm_prune.vlm.common.state import load_tensors
from vlm_prune.vlm.load import load
from vlm_prune.vlm.tiny import checkpoint_path
from vlm_prune.vlm.tiny.video import WEIGHTS, tiny_video_path, video_weights


@pytest.fixture(scope="module")
def loaded():
    return load("tiny-video", "cpu")


def test_what_is_packaged_is_small_safetensors_in_fp16():
    files = list(video_weights().iterdir())
    assert {file.name for file in files} == {WEIGHTS, "README.md", "training_log.jsonl"}
    assert sum(file.stat().st_size for file in files) <= 14_000_000
    tensors = load_tensors(video_weights() / WEIGHTS)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert not any("vision_tower" in name for name in tensors)


def test_it_is_an_unmodified_llava_onevision_with_the_tower_of_tiny(loaded):
    model, processor = loaded
    assert type(model) is LlavaOnevisionForConditionalGeneration
    assert type(processor) is LlavaOnevisionProcessor
    assert model.dtype == torch.float32 and model.config.text_config.max_position_embeddings > 9300
    (tower,) = (load_tensors(path / WEIGHTS) for path in (checkpoint_path(),))
    for name, tensor in load_tensors(tiny_video_path() / WEIGHTS).items():
        if "vision_tower" in name and "position" not in name:
            torch.testing.assert_close(tensor, tower[name], atol=0, rtol=0)
