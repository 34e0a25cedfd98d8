#!/usr/bin/env bash
# timm 1.0.31: `AttentionExtract(model, method="hook")` gives an empty dictionary for a ViT with fused attention, without a word.
#
# It listens to modules whose names end in `attn_drop`, and a block with fused attention, timm's default, calls none of them: no map is
# seen, and nothing says so. `method="fx"`, which looks for the softmax, raises for the same model. What reads "the attention of the tower"
# this way, to choose tokens or to draw them, gets nothing to read. Maps appear in both ways after `set_fused_attn(False)`, if
# that is called before the model is made.
#
# Seen with timm 1.0.31, torch 2.14.1, torchvision 0.29.1 on a CPU, vit_tiny_patch16_224 of 12 blocks:
#   fused: fx RuntimeError, hook 0 maps
#   not fused: fx 12 maps, hook 12 maps
# The script fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 timm==1.0.31
cat >"$folder/run.py" <<'PY'
import timm
import torch
from timm.layers import set_fused_attn
from timm.utils import AttentionExtract


def maps(method):
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False)
    try:
        extract = AttentionExtract(model, method=method)
    except RuntimeError:
        return "RuntimeError"
    with torch.no_grad():
        found = extract(torch.zeros(1, 3, 224, 224))
    assert all(part.shape == (1, 3, 197, 197) for part in found.values())
    return f"{len(found)} maps"


seen = []
for fused in (True, False):
    set_fused_attn(fused)
    seen.append(f"{'fused' if fused else 'not fused'}: fx {maps('fx')}, hook {maps('hook')}")
print("\n".join(seen))
expected = ["fused: fx RuntimeError, hook 0 maps", "not fused: fx 12 maps, hook 12 maps"]
assert seen == expected, "this changed"
PY
HF_HUB_OFFLINE=1 "$folder/env/bin/python" -W ignore "$folder/run.py"
