"""How a checkpoint's weights are stored: names that both transformers and vLLM read, and fp16.

transformers has dropped a level of the CLIP and SigLIP towers: it saves `vision_tower.encoder` for
what it read as `vision_tower.vision_model.encoder`, and it reads both. vLLM reads the latter.
"""

import json
import re
from pathlib import Path

from vlm_prune.vlm.common.files import write_text

TOWERS = ("clip_vision_model", "siglip_vision_model")
_TOWER = re.compile(r"^(model\.)?vision_tower\.(?!vision_model\.)")


def shared_name(name: str) -> str:
    """Returns the name, of a weight of a model with a CLIP or SigLIP tower, that
    transformers and vLLM both read.
    """
    return _TOWER.sub(lambda found: f"{found[1] or ''}vision_tower.vision_model.", name)


def rename_weights(folder: Path) -> int:
    """Renames the weights of a saved checkpoint in place, sharded or not, where it needs it.

    Returns:
        How many names changed.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("vision_config", {}).get("model_type") not in TOWERS:
        return 0
    changed = 0
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, "pt") as weights:
            metadata, names = weights.metadata(), list(weights.keys())
            tensors = {shared_name(name): weights.get_tensor(name) for name in names}
        differing = len(tensors.keys() - set(names))
        if differing:
            whole = file.with_suffix(".renamed")
            save_file(tensors, whole, metadata)
            whole.replace(file)
        changed += differing
    index = folder / "model.safetensors.index.json"
    if changed and index.is_file():
        content = json.loads(index.read_text(encoding="utf-8"))
        files = content["weight_map"].items()
        content["weight_map"] = {shared_name(name): file for name, file in files}
        write_text(index, json.dumps(content, indent=2) + "\n")
    return changed


def halve_weights(file: Path) -> None:
    """Rewrites a safetensors file in fp16; the configuration beside it still says what loads.

    Raises:
        InputError: if the file is missing or damaged.
    """
    import torch
    from safetensors.torch import save_file

    from vlm_prune.vlm.common.state import load_tensors

    tensors = {name: tensor.to(torch.float16) for name, tensor in load_tensors(file).items()}
    save_file(tensors, file, {"format": "pt"})
