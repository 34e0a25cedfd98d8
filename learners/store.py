"""The learners alone on disk: safetensors and a JSON, laid out as peft lays out adapters."""

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import save_file
from torch import Tensor

from vlm_prune.learners.config import WingsConfig
from vlm_prune.learners.model import attach, attached, detach, wings_layers
from vlm_prune.vlm.checkpoint import check_finite, locate_files
from vlm_prune.vlm.common.errors import InputError, naming
from vlm_prune.vlm.common.files import atomic_path, open_regular, write_json
from vlm_prune.vlm.common.records import read_record
from vlm_prune.vlm.common.state import load_tensors, writing
from vlm_prune.vlm.families import family_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def adapter_state(model: Any) -> dict[str, Tensor]:
    """Returns the learners' weights, named `layers.<number>.<path>`;
    shared with the model, not copied.
    """
    return {
        f"layers.{number}.{name}": tensor
        for number, layer in wings_layers(model).items()
        for name, tensor in layer.state_dict().items()
    }


def save_pretrained(model: Any, folder: str | Path) -> None:
    """Writes the learners alone, as `adapter_config.json` and `adapter_model.safetensors`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    described = {
        "peft_type": "WINGS",
        "base_model_name_or_path": str(getattr(model, "name_or_path", "")),
        "base": _base(model),
        "wings": asdict(attached(model).config),
    }
    tensors = {name: tensor.contiguous() for name, tensor in adapter_state(model).items()}
    with atomic_path(folder / WEIGHTS) as partial, writing(folder / WEIGHTS):
        save_file(tensors, partial, metadata={"format": "pt"})
    write_json(folder / CONFIG, described)


def from_pretrained(model: Any, name: str | Path) -> None:
    """Attaches the learners that `save_pretrained` wrote to a folder, or those of a hub name.

    Raises:
        InputError: if there are none, they are damaged, or they belong to another model.
    """
    config, weights = read_adapter(model, name)
    attach(model, config)
    try:
        load_adapter_state(model, weights)
    except InputError:
        detach(model)
        raise


def read_adapter(model: Any, name: str | Path) -> tuple[WingsConfig, dict[str, Tensor]]:
    """Reads the options and weights of an adapter for `model`, in a folder or under a hub name.

    Raises:
        InputError: if there is none, it is damaged, or it belongs to another model.
    """
    with naming(f"cannot read a Wings adapter from {str(name)!r}"):
        folder = locate_files(name, [CONFIG, WEIGHTS])
        described = read_record(
            folder / CONFIG, _Described, "it is no adapter_config.json of Wings"
        )
        config = WingsConfig.from_dict(described.wings)
        weights = load_tensors(folder / WEIGHTS)
        check_finite(weights)
        # the one size that nothing else bounds
        positions = [len(t) for n, t in weights.items() if n.endswith("router.weight") and t.ndim]
        if config.routed and set(positions) != {config.max_positions}:
            raise InputError(
                f"max_positions is {config.max_positions}, which its weights are not for"
            )
    base = _base(model)
    if described.base != base:
        raise InputError(
            f"this adapter is for {_words(described.base)}; the model is {_words(base)}"
        )
    return config, weights


def adapter_digest(name: str | Path) -> str:
    """Returns 16 hexadecimal digits that change with an adapter's options or weights.

    Raises:
        InputError: if there is none in the folder or under the hub name.
    """
    found = hashlib.sha256()
    with naming(f"cannot read an adapter from {str(name)!r}"):
        folder = locate_files(name, [CONFIG, WEIGHTS])
        for part in (CONFIG, WEIGHTS):
            with open_regular(folder / part) as file:
                while block := file.read(2**20):
                    found.update(block)
    return found.hexdigest()[:16]


def load_adapter_state(model: Any, weights: dict[str, Tensor], strict: bool = True) -> None:
    """Copies weights as `adapter_state` names them into the learners.

    Not `strict`, learners without weights keep theirs: so stage 2 takes over stage 1's.

    Args:
        model: with learners.
        weights: tensors by the names that `adapter_state` gives.
        strict: whether every learner's weights must be there; otherwise learners without weights
            keep theirs, so that stage 2 takes over stage 1's.

    Raises:
        InputError: if names or shapes do not fit.
    """
    current = adapter_state(model)
    wrong = sorted(weights.keys() - current.keys()) + (
        sorted(current.keys() - weights.keys()) if strict else []
    )
    wrong += [n for n in weights.keys() & current.keys() if weights[n].shape != current[n].shape]
    if wrong:
        raise InputError(f"the adapter's weights do not fit its configuration, first {wrong[0]!r}")
    with torch.no_grad():
        for name, tensor in weights.items():
            current[name].copy_(tensor)


class _Described(msgspec.Struct):
    """What `adapter_config.json` holds of learners."""

    base: dict[str, Any]
    wings: dict[str, Any]


def _base(model: Any) -> dict[str, Any]:
    decoder = family_of(model).decoder
    return {
        "model_type": decoder.config.model_type,
        "hidden_size": decoder.config.hidden_size,
        "num_hidden_layers": len(decoder.layers),
        "head_dim": decoder.layers[0].self_attn.head_dim,
    }


def _words(base: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in base.items())
