#!/usr/bin/env bash
# transformers 5.24.0: Qwen2.5-VL places an image's tokens like text where `mm_token_type_ids` is missing; Qwen3-VL raises an error.
#
# Both models know from `mm_token_type_ids`, which their processors return, which tokens are an image's and get rows and columns as
# positions. A collate function that passes on ids, mask, pixels and `image_grid_thw` alone drops it. Qwen3-VL then says what is
# missing. Qwen2.5-VL, in a forward as in `generate`, finds the places by the token's id and fills in the features, but counts each
# token as a step of text: after an image of 8 x 8 tokens the question stands 56 positions further than with the types, without a warning.
#
# Seen with torch 2.14.1, transformers 5.24.0 on a CPU, random weights, position of the prompt's last token in time, row and column:
#   Qwen2_5_VLForConditionalGeneration with types [12, 12, 12]
#   Qwen2_5_VLForConditionalGeneration without types [68, 68, 68]
#   Qwen3VLForConditionalGeneration with types [12, 12, 12]
#   Qwen3VLForConditionalGeneration without types: ValueError
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
prompt = {
    "input_ids": ids, "attention_mask": torch.ones_like(ids),
    "pixel_values": torch.randn(256, 3 * 2 * 14 * 14), "image_grid_thw": torch.tensor([[1, 16, 16]]),
}
found = {}
for kind, config in ((Qwen2_5_VLForConditionalGeneration, older), (Qwen3VLForConditionalGeneration, newer)):
    model = kind(config).eval()
    for name, more in (("with types", {"mm_token_type_ids": (ids == 60).int()}), ("without types", {})):
        seen = []
        rotary = model.model.language_model.rotary_emb
        hook = rotary.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(args[1] if len(args) > 1 else kwargs["position_ids"]), with_kwargs=True
        )
        calls = (lambda **inputs: model(**inputs), lambda **inputs: model.generate(**inputs, max_new_tokens=1))
        try:
            with torch.no_grad():
                for call in calls:
                    call(**prompt, **more)
            ends = [positions[-3:, 0, -1].tolist() for positions in seen]
            assert ends[0] == ends[1], "forward and generate differ"
            said = f" {ends[0]}"
        except ValueError as error:
            said = ": ValueError"
            assert "mm_token_type_ids" in str(error)
        hook.remove()
        found[kind.__name__, name] = said
        print(f"{kind.__name__} {name}{said}")
assert list(found.values()) == [" [12, 12, 12]", " [68, 68, 68]", " [12, 12, 12]", ": ValueError"], "the behavior has changed"
PY
HF_HUB_OFFLINE=1 "$folder/env/bin/python" -W ignore "$folder/run.py"
echo "as described: without types Qwen2.5-VL counts an image's tokens as text"
