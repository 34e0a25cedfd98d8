#!/usr/bin/env bash
# transformers 5.24.0: eager attention in float64 turns a whole left-padded row into NaN; float32 and SDPA do not.
#
# The additive mask holds `torch.finfo(dtype).min` for what must not be seen. Eager attention casts the masked scores to float32
# for the softmax, where the float64 minimum is minus infinity. A padding position at the left sees nothing else, so its softmax is
# NaN; in the next layer its values are multiplied by weights of zero, which gives NaN too, and so every token of the padded row
# ends as NaN, the real ones included. A float64 copy of a model is the usual reference for numerical tests, with eager attention
# to see the weights: both together fail on batches of unequal length. float32 and SDPA give finite logits for the same batch.
#
# Seen with transformers 5.24.0, torch 2.13.0, on LlavaForConditionalGeneration with random weights and text alone:
#   torch.float32 eager: NaN rows []
#   torch.float32 sdpa: NaN rows []
#   torch.float64 eager: NaN rows [0]
#   torch.float64 sdpa: NaN rows []
# The script fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet transformers==5.24.0 torch==2.13.0 pillow==12.3.0
cat >"$folder/run.py" <<'PY'
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

widths = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
tower = CLIPVisionConfig(**widths, image_size=28, patch_size=14).to_dict()
text = LlamaConfig(**widths, num_key_value_heads=2, vocab_size=64).to_dict()
config = LlavaConfig(vision_config=tower, text_config=text, image_token_index=63)
rows = torch.tensor([[0, 0, 1, 2, 3], [5, 6, 7, 8, 9]])
mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
found = {}
for dtype in (torch.float32, torch.float64):
    for attention in ("eager", "sdpa"):
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration._from_config(config, attn_implementation=attention)
        with torch.no_grad():
            logits = model.to(dtype).eval()(input_ids=rows, attention_mask=mask).logits
        real = [row for row in range(2) if logits[row][mask[row].bool()].isnan().all()]
        print(f"{dtype} {attention}: NaN rows {real}")
        found[dtype, attention] = real
assert found.pop((torch.float64, "eager")) == [0], "the behavior has changed"
assert not any(found.values()), "the behavior has changed"
PY
HF_HUB_OFFLINE=1 "$folder/env/bin/python" "$folder/run.py"
echo "as described: float64 with eager attention loses the padded row"
