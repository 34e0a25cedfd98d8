"""What a vision-language model is, for the rest of the suite."""

from typing import TYPE_CHECKING, Any

from vlm_prune.vlm.common.errors import InputError

if TYPE_CHECKING:
    from vlm_prune.pruning.pipeline import PrunedVLM

__all__ = ["InputError", "PrunedVLM"]


def __getattr__(name: str) -> Any:
    """Imports torch only when the wrapper is asked for, and returns it."""
    if name == "PrunedVLM":
        from vlm_prune.pruning.pipeline import PrunedVLM

        return PrunedVLM
    raise AttributeError(name)
