"""Saving the embedded checkpoint: half-precision safetensors, swapped in as a whole."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from vlm_prune.vlm.common.files import atomic_path
from vlm_prune.vlm.common.state import writing
from vlm_prune.vlm.stored_weights import halve_weights, rename_weights


def save_checkpoint(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path
) -> None:
    """Writes model and processor beside `folder`, then renames; other files in it are kept.

    Tensors are stored as fp16 while the configuration says float32, so that the model loads
    ready for a CPU. Their names are those that vLLM reads too.

    Args:
        model: the embedded LLaVA.
        processor: the model's.
        folder: what is replaced, or made.

    Raises:
        InputError: if the files cannot be written.
    """
    fresh = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    with writing(folder):
        model.save_pretrained(fresh)
        processor.save_pretrained(fresh)
        halve_weights(fresh / "model.safetensors")
    rename_weights(fresh)
    if folder.is_dir():
        for kept in folder.iterdir():
            if not (fresh / kept.name).exists():
                shutil.copy2(kept, fresh / kept.name)
        old = folder.with_name(f"{folder.name}.old")
        folder.rename(old)
        fresh.rename(folder)
        shutil.rmtree(old)
    else:
        fresh.rename(folder)


def save_language_model(model: LlavaForConditionalGeneration, path: Path) -> None:
    """Writes the language model's tensors alone, named as they are in the whole model."""
    state = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name.startswith("model.language_model.")
    }
    with atomic_path(path) as partial, writing(path):
        save_file(_half(state), partial, {"format": "pt"})


def _half(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(torch.float16).contiguous() for name, tensor in weights.items()}
