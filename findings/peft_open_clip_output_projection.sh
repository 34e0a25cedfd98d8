#!/usr/bin/env bash
# peft 0.21.2: LoRA on the output projection of attention in open_clip never acts in a forward, yet merging applies it.
#
# Attention in open_clip's blocks is `nn.MultiheadAttention`, which reads `out_proj.weight` and never calls that layer. With
# `target_modules=["out_proj", "c_fc"]` peft wraps both layers and makes the matrices of both trainable, but what it wraps around
# `out_proj` hands out the base weight: those matrices get no gradient and change no output, without a warning. Merging adds them all
# the same where they are not zero, so that a merged model differs from the one that was evaluated. PiSSA, which moves the largest part
# of a weight into the adapter, changes the untrained model at once, and merging repairs it. Named as a whole, "attn", it is adapted right.
#
# Seen with torch 2.14.1, open_clip_torch 3.3.0, peft 0.21.2 on a CPU, image features of a small CLIP with random weights:
#   out_proj and c_fc: layers with a gradient: out_proj 0 of 2, c_fc 2 of 2; merged like adapted: False
#   attn and c_fc: layers with a gradient: out_proj 2 of 2, c_fc 2 of 2; merged like adapted: True
#   out_proj, PiSSA, untrained: like the base: False; merged like the base: True
# The script fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 open_clip_torch==3.3.0 timm==1.0.31 peft==0.21.2 transformers==5.24.0
cat >"$folder/run.py" <<'PY'
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from peft import LoraConfig, get_peft_model


def clip():
    torch.manual_seed(0)
    vision = CLIPVisionCfg(layers=2, width=64, head_width=32, patch_size=8, image_size=32)
    return CLIP(32, vision, CLIPTextCfg(context_length=8, vocab_size=64, width=64, heads=2, layers=2)).eval()


def like(one, other):
    return torch.allclose(one, other, atol=1e-5)


images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
base = clip().encode_image(images).detach()
found = []
for targets in (["out_proj", "c_fc"], ["attn", "c_fc"]):
    torch.manual_seed(1)
    # B is drawn, not zero, as after training
    model = get_peft_model(clip(), LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).eval()
    adapted = model.base_model.model.encode_image(images)
    adapted.sum().backward()
    counts = []
    for name in ("out_proj", "c_fc"):
        ups = [p for n, p in model.named_parameters() if "visual" in n and name in n and "lora_B" in n]
        assert len(ups) == 2 and all(p.requires_grad for p in ups)
        counts.append(sum(p.grad is not None and bool(p.grad.any()) for p in ups))
    with torch.no_grad():
        merged = like(model.merge_and_unload().encode_image(images), adapted)
    found.append((*counts, merged))
    print(
        f"{' and '.join(targets)}: layers with a gradient: out_proj {counts[0]} of 2, c_fc {counts[1]} of 2; "
        f"merged like adapted: {merged}"
    )
with torch.no_grad():
    model = get_peft_model(clip(), LoraConfig(r=4, target_modules=["out_proj"], init_lora_weights="pissa")).eval()
    untrained = like(model.base_model.model.encode_image(images), base)
    merged = like(model.merge_and_unload().encode_image(images), base)
print(f"out_proj, PiSSA, untrained: like the base: {untrained}; merged like the base: {merged}")
assert found[0] == (0, 2, False), "the adapter of out_proj acts now"
assert found[1] == (2, 2, True) and (untrained, merged) == (False, True), "the behavior has changed"
PY
HF_HUB_OFFLINE=1 "$folder/env/bin/python" -W ignore "$folder/run.py"
echo "as described: out_proj's adapter acts in a merged model only"
