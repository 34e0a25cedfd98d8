#!/usr/bin/env bash
# transformers 5.24.0: in Gemma 4's smaller models the last layers see one token of a prompt in `generate`, and all of it in a forward.
#
# These layers use keys and values of earlier ones, so they skip the tokens whose logits nobody asks for, and `generate` asks for the
# last only. Forward hooks on such a layer, the usual way to read or to steer hidden states, then get one token of the prompt
# where the first layers give all, and code that indexes image tokens there fails or reads another token. `output_hidden_states=True`
# switches this off for the whole forward, so what hooks see depends on another option; so does `logits_to_keep` as a tensor.
#
# Seen with torch 2.14.1, transformers 5.24.0 on a CPU, tokens that hooks on four layers see of a prompt of 6, two layers with own keys:
#   forward [6, 6, 6, 6]
#   forward, logits_to_keep=1 [6, 6, 1, 1]
#   forward, logits_to_keep=1, output_hidden_states=True [6, 6, 6, 6]
#   forward, logits_to_keep=tensor([5]) [6, 6, 6, 6]
#   generate [6, 6, 1, 1]
# The script fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 transformers==5.24.0 pillow
cat >"$folder/run.py" <<'PY'
import torch
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

config = Gemma4TextConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_kv_shared_layers=2,
    layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=8, num_attention_heads=2, num_key_value_heads=1,
    head_dim=16, global_head_dim=16, hidden_size_per_layer_input=8, vocab_size_per_layer_input=64,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)
torch.manual_seed(0)
model, seen, found, logits = Gemma4ForCausalLM(config).eval(), [], {}, []
for layer in model.model.layers:
    layer.register_forward_hook(lambda _, args, output: seen.append((output[0] if isinstance(output, tuple) else output).shape[-2]))
ids = torch.tensor([[1, 5, 6, 7, 8, 9]])
for name, options in (
    ("forward", {}),
    ("forward, logits_to_keep=1", {"logits_to_keep": 1}),
    ("forward, logits_to_keep=1, output_hidden_states=True", {"logits_to_keep": 1, "output_hidden_states": True}),
    ("forward, logits_to_keep=tensor([5])", {"logits_to_keep": torch.tensor([5])}),
    ("generate", None),
):
    seen.clear()
    with torch.no_grad():
        if options is None:
            model.generate(ids, max_new_tokens=1, do_sample=False)
        else:
            logits.append(model(input_ids=ids, **options).logits[:, -1])
    found[name] = list(seen)
    print(name, seen)
for other in logits[1:]:
    torch.testing.assert_close(other, logits[0])
short = found.pop("forward, logits_to_keep=1"), found.pop("generate")
assert short == ([6, 6, 1, 1],) * 2, "the last layers see the whole prompt now"
assert all(lengths == [6] * 4 for lengths in found.values()), "the behavior has changed"
PY
HF_HUB_OFFLINE=1 "$folder/env/bin/python" -W ignore "$folder/run.py"
echo "as described: the last layers see one token"
