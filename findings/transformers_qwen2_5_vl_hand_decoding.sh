#!/usr/bin/env bash
# transformers 5.24.0: a decoding loop written by hand over Qwen2.5-VL ends in a shape error if it passes the attention mask.
#
# The usual loop passes the new token, the cache and the mask of everything so far. Qwen2.5-VL takes it as long as the prompt came
# without `mm_token_type_ids`; with them, which is what its processor returns, the next call with a mask raises RuntimeError
# ("mat1 and mat2 shapes cannot be multiplied"): positions are made for the whole length of the mask while one token is given.
# Without the mask the same call gives what the whole prompt gives. So a loop that was tested on ids written by hand fails on
# the processor's output, and a left-padded batch, which needs the mask, cannot be decoded by hand at all; `generate` can.
#
# Seen with transformers 5.24.0, torch 2.13.0, on Qwen2_5_VLForConditionalGeneration with random weights:
#   prompt without mm_token_type_ids, then no mask: equal to the whole prompt
#   prompt without mm_token_type_ids, then a mask: equal to the whole prompt
#   prompt with mm_token_type_ids, then no mask: equal to the whole prompt
#   prompt with mm_token_type_ids, then a mask: RuntimeError: mat1 and mat2 shapes cannot be multiplied (1x320 and 32x32)
# The script fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet transformers==5.24.0 torch==2.13.0 pillow==12.3.0
cat >"$folder/run.py" <<'PY'
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

sizes = {"hidden_size": 32, "intermediate_size": 32}
text = sizes | {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64}
text |= {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
tower = sizes | {"depth": 1, "num_heads": 2, "out_hidden_size": 32, "fullatt_block_indexes": [0]}
markers = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
torch.manual_seed(0)
model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=tower, **markers)).eval()

ids = torch.tensor([[5, 62, 60, 60, 60, 60, 63, 7, 8]])
image = {"pixel_values": torch.randn(16, 3 * 2 * 14 * 14), "image_grid_thw": torch.tensor([[1, 4, 4]])}
found = []
for kinds in (False, True):

    def prompt(ids):
        more = {"mm_token_type_ids": (ids == 60).int()} if kinds else {}
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **image, **more}

    for masked in (False, True):
        with torch.no_grad():
            first = model(**prompt(ids), use_cache=True)
            token = first.logits[:, -1:].argmax(-1)
            longer = torch.cat([ids, token], 1)
            whole = model(**prompt(longer)).logits[:, -1]
            try:
                step = {"attention_mask": torch.ones_like(longer)} if masked else {}
                logits = model(input_ids=token, past_key_values=first.past_key_values, **step).logits[:, -1]
                said = "equal to the whole prompt" if torch.allclose(logits, whole, atol=1e-5) else "another token"
            except RuntimeError as error:
                said = f"RuntimeError: {error}"
        print(f"prompt with{'' if kinds else 'out'} mm_token_type_ids, then {'a' if masked else 'no'} mask: {said}")
        found.append(said)
assert found[:3] == ["equal to the whole prompt"] * 3 and "cannot be multiplied" in found[3], "the behavior has changed"
PY
HF_HUB_OFFLINE=1 "$folder/env/bin/python" -W ignore "$folder/run.py"
echo "as described: with mm_token_type_ids the step with a mask fails"
