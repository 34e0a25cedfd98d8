#!/usr/bin/env bash
# torch 2.14.1: FlopCounterMode counts nothing for nn.MultiheadAttention and nn.TransformerEncoderLayer where gradients are off.
#
# Both modules have a fused path for inference, one operator for the whole layer, which the counter has no formula for; it says
# nothing of operators that it does not know. With gradients on, the same modules in the same eval mode run as separate products and
# are counted. CLIP models in open_clip are built of nn.MultiheadAttention, so that a count of an image tower under `no_grad` misses
# projections and attention of every block and has the feed-forward layers alone: for ViT-B/16, 22.5 of 35.1 GFLOP.
#
# Seen with torch 2.14.1 on a CPU, both modules in eval mode:
#   MultiheadAttention, gradients on: 4,556,800 FLOPs
#   MultiheadAttention, gradients off: 0 FLOPs
#   TransformerEncoderLayer, gradients on: 6,553,600 FLOPs
#   TransformerEncoderLayer, gradients off: 0 FLOPs
# The script fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.14.1
cat >"$folder/run.py" <<'PY'
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

attention = nn.MultiheadAttention(64, 4, batch_first=True).eval()
layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
x = torch.randn(2, 50, 64)
found = {}
for name, module, inputs in (("MultiheadAttention", attention, (x, x, x)), ("TransformerEncoderLayer", layer, (x,))):
    for grad in (True, False):
        with torch.set_grad_enabled(grad), FlopCounterMode(display=False) as counter:
            module(*inputs)
        found[name, grad] = counter.get_total_flops()
        print(f"{name}, gradients {'on' if grad else 'off'}: {found[name, grad]:,} FLOPs")
for name in ("MultiheadAttention", "TransformerEncoderLayer"):
    assert found[name, True] > 0, f"{name} is no longer counted with gradients"
    assert found[name, False] == 0, f"{name} is counted without gradients now"
PY
"$folder/env/bin/python" -W ignore "$folder/run.py"
echo "as described: without gradients neither module is counted"
