#!/usr/bin/env bash
# transformers 5.24.0: a CLIP text tower whose end token has id 2 pools the token with the highest id instead.
#
# CLIPTextModel pools the first end token, `eos_token_id`. The value 2, which older configurations hold by mistake, is taken as a sign
# of these: of each text the highest id is pooled, which is the end token in OpenAI's vocabulary. In a small vocabulary of one's own
# padding, start and end are often 0, 1 and 2, so a text's feature is read at whichever of its words has the highest id.
# Attention is causal, so words behind that one change nothing: two classes that differ there get one feature, without a warning.
# Any other id of the end token works.
#
# Seen with torch 2.14.1, transformers 5.24.0 on a CPU, random weights, texts of the words 40 9 and 40 11 between start and end:
#   end token 2: pooled positions [1, 1], largest difference 0.0
#   end token 3: pooled positions [3, 3], differ
# The script fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.14.1 transformers==5.24.0
cat >"$folder/run.py" <<'PY'
import torch
from transformers import CLIPTextConfig, CLIPTextModel

pooled, gaps = {}, {}
for end in (2, 3):
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=6, pad_token_id=0, bos_token_id=1, eos_token_id=end,
    )
    texts = torch.tensor([[1, 40, 9, end, 0, 0], [1, 40, 11, end, 0, 0]])
    with torch.no_grad():
        output = CLIPTextModel(config).eval()(texts)
    distances = (output.last_hidden_state - output.pooler_output[:, None]).abs().amax(-1)
    assert not distances.amin(1).any()
    pooled[end] = distances.argmin(1).tolist()
    gaps[end] = float((output.pooler_output[0] - output.pooler_output[1]).abs().max())
    said = f"largest difference {gaps[end]}" if gaps[end] == 0 else "differ"
    print(f"end token {end}: pooled positions {pooled[end]}, {said}")
assert pooled[3] == [3, 3] and gaps[3] > 0
assert pooled[2] == [1, 1] and gaps[2] == 0, "the end token is pooled now"
PY
HF_HUB_OFFLINE=1 "$folder/env/bin/python" -W ignore "$folder/run.py"
echo "as described: the highest id is pooled where the end token is 2"
