"""Kept tokens of Qwen models stand in vLLM where they stand in the Hugging Face route."""

import pytest
import torch
from PIL import Image

from vlm_prune.pruning.registry import build


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_positions_are_those_of_the_hugging_face_route(family, folders, pictures, prompts, start):
    engine = start(
        folders(family), "divprune", 8, max_num_batched_tokens=32, enable_prefix_caching=False
    )
    ours, theirs = [], []

    def seen(_, args, kwargs):
        ours.append(args[0] if args else kwargs["positions"])

    def expected(_, args, kwargs):
        ids = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
        theirs.append(ids[-3:, 0])

    layer = engine.served.language_model.model.layers[0]
    layer.register_forward_pre_hook(seen, with_kwargs=True)
    rotary = engine.model.model.language_model.rotary_emb
    rotary.register_forward_pre_hook(expected, with_kwargs=True)
    for prompt in prompts:
        del ours[:], theirs[:]
        answer, kept = engine.reference(prompt, pictures, build("divprune", budget=8))
        assert engine.answers([prompt], pictures) == [answer]
        assert torch.equal(torch.cat(ours, 1), torch.cat(theirs, 1))
        # the rows of an image's kept tokens and their columns are not without gaps
        assert len(kept) == len(prompt[0])
    # a picture that the processor does not take is refused, and the engine goes on
    with pytest.raises(ValueError, match="aspect ratio|Failed to apply"):
        engine.answers(prompts[:1], [Image.new("RGB", (900, 1))])
    assert engine.answers(prompts[-1:], pictures) == [answer]
