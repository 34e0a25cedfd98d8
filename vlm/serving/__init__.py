"""Pruning inside vLLM; nothing here imports vLLM, or torch, before it is needed."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm_prune.vlm.serving.embeds import as_content, image_embeds

__all__ = ["as_content", "image_embeds"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from vlm_prune.vlm.serving import embeds

        return getattr(embeds, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
