#!/usr/bin/env bash
# transformers 5.24.0: Mistral 3 raises an error about `split_with_sizes` for one image of at most 28 x 28 pixels.
#
# A token of Mistral 3 is 2 x 2 patches of 14 x 14 pixels, and its processor never enlarges an image, so an icon is a single token.
# `get_image_features` takes the first axis off what its projector returns, (tokens, width), before it splits the tokens among the
# images. With one token in all that axis is the token's, and `width` numbers are split into one. A larger image works, and
# so do two icons in one forward, each as small as the one that fails.
#
# Seen with torch 2.14.1, transformers 5.24.0 on a CPU:
#   28 x 28: RuntimeError: split_with_sizes expects split_sizes to sum exactly to 32 (input tensor's size at dimension 0), but got split_sizes=[1]
#   56 x 28: logits of 4 tokens
#   two of 28 x 28: logits of 4 tokens
# The script fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 transformers==5.24.0 pillow
cat >"$folder/run.py" <<'PY'
import torch
from transformers import (
    Mistral3Config, Mistral3ForConditionalGeneration, MistralConfig, PixtralVisionConfig,
)

widths = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
config = Mistral3Config(
    vision_config=PixtralVisionConfig(**widths, image_size=112, patch_size=14).to_dict(),
    text_config=MistralConfig(**widths, num_key_value_heads=2, head_dim=16, vocab_size=64).to_dict(),
    image_token_id=63, spatial_merge_size=2,
)
torch.manual_seed(0)
model = Mistral3ForConditionalGeneration(config).eval()
found = {}
for name, sizes in (("28 x 28", [[28, 28]]), ("56 x 28", [[56, 28]]), ("two of 28 x 28", [[28, 28]] * 2)):
    sizes = torch.tensor(sizes)
    height, width = sizes.amax(0).tolist()
    pixels = torch.randn(len(sizes), 3, height, width)
    tokens = int((sizes // 28).prod(1).sum())
    ids = torch.tensor([[1] + [63] * tokens + [2]])
    try:
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=pixels, image_sizes=sizes).logits
        found[name] = f"logits of {logits.shape[1]} tokens"
    except RuntimeError as error:
        found[name] = f"RuntimeError: {error}"
    print(f"{name}: {found[name]}")
assert "split_with_sizes" in found["28 x 28"], "a single token is encoded now"
assert found["56 x 28"] == found["two of 28 x 28"] == "logits of 4 tokens"
PY
HF_HUB_OFFLINE=1 "$folder/env/bin/python" -W ignore "$folder/run.py"
echo "as described: one token alone is an error, two are not"
