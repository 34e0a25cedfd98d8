#!/usr/bin/env bash
# transformers 5.24.0: Qwen-VL models decode a text-only prompt at shifted positions if they saw an image prompt before.
#
# A forward over an image stores on the model by how much its tokens shorten the positions (`rope_deltas`), and a later forward
# with a cache adds what is stored. A forward over a prompt without images leaves the value where it is. So a loop written by hand,
# prompt first and then one token with the cache, gives the whole prompt's logits on a fresh model, and other ones once any image
# went through the same model, another user's in a server, say. Nothing about the text prompt, its cache or its call differs.
# `generate` sets the value to zero for a text prompt; so does `model.model.rope_deltas = None` in front of the loop.
#
# Seen with torch 2.14.1, transformers 5.24.0 on a CPU, random weights, position of the token after a prompt of 4:
#   Qwen2_5_VLForConditionalGeneration: fresh 4, after an image -52, after an image and a reset 4
#   Qwen3VLForConditionalGeneration: fresh 4, after an image -52, after an image and a reset 4
# The script fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 transformers==5.24.0 pillow
cat >"$folder/run.py" <<'PY'
import torch
from transformers import (
    Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen3VLConfig, Qwen3VLForConditionalGeneration,
)

widths = {"hidden_size": 32, "intermediate_size": 32}
heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
text = widths | heads | {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
markers = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
tower = widths | {"depth": 1, "num_heads": 2, "out_hidden_size": 32, "patch_size": 14}
older = Qwen2_5_VLConfig(text_config=text, vision_config=tower | {"fullatt_block_indexes": [0]}, **markers)
newer = Qwen3VLConfig(text_config=text, vision_config=tower | {"deepstack_visual_indexes": [0]}, **markers)
ids = torch.tensor([[5, 62, *[60] * 64, 63, 7, 8]])
image = {
    "input_ids": ids, "mm_token_type_ids": (ids == 60).int(),
    "pixel_values": torch.randn(256, 3 * 2 * 14 * 14), "image_grid_thw": torch.tensor([[1, 16, 16]]),
}


def step(model):
    """Returns the position of a token after a text prompt of 4, and its logits, with a cache and as a whole."""
    seen = []
    hook = model.model.language_model.rotary_emb.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[1] if len(args) > 1 else kwargs["position_ids"]), with_kwargs=True
    )
    with torch.no_grad():
        first = model(input_ids=torch.tensor([[5, 7, 8, 9]]), use_cache=True)
        logits = model(input_ids=torch.tensor([[10]]), cache=first.cache).logits
        hook.remove()
        whole = model(input_ids=torch.tensor([[5, 7, 8, 9, 10]])).logits[:, -1:]
    return int(seen[1].flatten()[-1]), logits, whole


for kind, config in ((Qwen2_5_VLForConditionalGeneration, older), (Qwen3VLForConditionalGeneration, newer)):
    torch.manual_seed(0)
    model = kind(config).eval()
    fresh, logits, whole = step(model)
    torch.testing.assert_close(logits, whole)
    with torch.no_grad():
        model(**image)
    assert model.model.rope_deltas.item() == -56
    shifted, logits, whole = step(model)
    assert not torch.allclose(logits, whole, atol=1e-6), "the logits are the whole prompt's now"
    model.model.rope_deltas = None
    again, logits, whole = step(model)
    torch.testing.assert_close(logits, whole)
    with torch.no_grad():
        model(**image)
    model.generate(torch.tensor([[5, 7, 8, 9]]), max_new_tokens=1)
    assert model.model.rope_deltas.item() == 0
    print(f"{kind.__name__}: fresh {fresh}, after an image {shifted}, after an image and a reset {again}")
    assert (fresh, shifted, again) == (4, -52, 4), "the behavior has changed"
PY
HF_HUB_OFFLINE=1 "$folder/env/bin/python" -W ignore "$folder/run.py"
echo "as described: an earlier image shifts what follows a text prompt"
