"""What `eval --engine vllm` counts of images beside its engines, which run the tower themselves."""

import pytest
import torch
from tiny_families import Tiny

from vlm_prune.benchmarks.cli.support import serving_support
from vlm_prune.benchmarks.evaluation.prompts import make_prompts
from vlm_prune.benchmarks.evaluation.served import sizes_alone


@pytest.mark.parametrize("family", serving_support()["none"])
def test_tokens_and_operations_follow_from_sizes(family):
    tiny = Tiny(family)
    content = [{"type": "image"}, {"type": "text", "text": "red?"}]
    chat = [{"role": "user", "content": content}]
    texts = [tiny.processor.apply_chat_template(chat, add_generation_prompt=True)] * 3
    shown = [[picture] for picture in tiny.pictures[:3]]
    whole = make_prompts(tiny.model, tiny.processor, texts, shown)
    with sizes_alone(tiny.model):
        alone = make_prompts(tiny.model, tiny.processor, texts, shown)
    again = make_prompts(tiny.model, tiny.processor, texts, shown)
    for name in ("counts", "grids", "flops"):
        assert getattr(alone.vision, name) == getattr(whole.vision, name)
    assert torch.equal(alone.tensors["input_ids"], whole.tensors["input_ids"])
    before, without, after = (torch.cat(p.vision.projected) for p in (whole, alone, again))
    assert torch.equal(before, after) and not torch.equal(before, without)
