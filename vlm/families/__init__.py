"""One adapter per model family: where its parts are, and nothing else."""

from typing import Any

from vlm_prune.vlm.errors import InputError
from vlm_prune.vlm.families.llava import Llava
from vlm_prune.vlm.registry import Registry

FAMILIES: Registry[type[Llava]] = Registry("model family", {"llava": Llava})


def family_of(model: Any) -> Llava:
    """The adapter of a loaded model, recognised by its config.

    Raises:
        InputError: when the model is no supported vision-language model.
    """
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in FAMILIES:
        raise InputError(f"model type {kind!r} is not supported; supported: {', '.join(FAMILIES)}")
    return FAMILIES[kind](model)
