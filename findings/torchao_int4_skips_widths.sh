#!/usr/bin/env bash
# torchao 0.18.0: `Int4WeightOnlyConfig()` leaves each linear layer as it was whose input width is no multiple of 128, at logging level INFO.
#
# Two of our field's usual parts have such widths: SigLIP so400m, the tower of LLaVA-OneVision, PaliGemma and Idefics3, has MLPs of 4304, and
# SmolLM2-135M, the language model of SmolVLM-256M, is 576 wide, so that of its seven matrices a layer only `down_proj` is packed.
# `quantize_`, and `from_pretrained` with transformers' TorchAoConfig, which calls it, say nothing under Python's default logging: the model that
# "is int4" holds most of its weights in bfloat16, and its memory and speed are taken for int4's. A layer that fits raises here for
# want of kernels (`mslk` >= 1.0.0, of which PyPI has an empty 0.0.0), which shows the ones that torchao would pack.
# `Int4WeightOnlyConfig(group_size=32)` takes the width 576, but not 4304.
#
# Seen with torchao 0.18.0, torch 2.14.1 on a CPU:
#   SmolLM2-135M q_proj 576 x 576: as it was; in groups of 32: would be packed
#   SmolLM2-135M gate_proj 576 x 1536: as it was; in groups of 32: would be packed
#   SmolLM2-135M down_proj 1536 x 576: would be packed; in groups of 32: would be packed
#   SigLIP so400m q_proj 1152 x 1152: would be packed; in groups of 32: would be packed
#   SigLIP so400m fc1 1152 x 4304: would be packed; in groups of 32: would be packed
#   SigLIP so400m fc2 4304 x 1152: as it was; in groups of 32: as it was
#   lines said: 0
# The script fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.14.1 torchao==0.18.0
cat >"$folder/run.py" <<'PY'
import logging

import torch
from torchao.quantization import Int4WeightOnlyConfig, quantize_

said = []


class Kept(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())


logging.getLogger().addHandler(Kept(logging.NOTSET))


def outcome(inputs, outputs, **options):
    model = torch.nn.Sequential(torch.nn.Linear(inputs, outputs, bias=False, dtype=torch.bfloat16))
    before = model[0].weight.detach().clone()
    try:
        quantize_(model, Int4WeightOnlyConfig(**options))
    except ImportError as error:
        assert "mslk" in str(error), error
        return "would be packed"
    same = type(model[0].weight.data) is torch.Tensor and torch.equal(model[0].weight, before)
    return "as it was" if same else "packed"


layers = {
    "SmolLM2-135M q_proj": (576, 576),
    "SmolLM2-135M gate_proj": (576, 1536),
    "SmolLM2-135M down_proj": (1536, 576),
    "SigLIP so400m q_proj": (1152, 1152),
    "SigLIP so400m fc1": (1152, 4304),
    "SigLIP so400m fc2": (4304, 1152),
}
seen = {}
for name, (inputs, outputs) in layers.items():
    seen[name] = outcome(inputs, outputs), outcome(inputs, outputs, group_size=32)
    print(f"{name} {inputs} x {outputs}: {seen[name][0]}; in groups of 32: {seen[name][1]}")
skipped = [text for text in said if "int4" in text]
print("lines said:", len(skipped))
fits, no = "would be packed", "as it was"
assert list(seen.values()) == [(no, fits), (no, fits), (fits, fits), (fits, fits), (fits, fits), (no, no)], "this changed"
assert not skipped, "this changed"
PY
"$folder/env/bin/python" -W ignore "$folder/run.py"
