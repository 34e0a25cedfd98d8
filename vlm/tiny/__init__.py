"""The embedded LLaVA: small enough for a laptop, trained to really see its own little world."""

from pathlib import Path


def checkpoint_path() -> Path:
    """Returns the folder of the packaged checkpoint, for `from_pretrained`."""
    return Path(__file__).parent / "checkpoint"


def text_language_model() -> Path:
    """Returns the packaged language model of the same shape that has
    seen text alone, in safetensors.
    """
    return Path(__file__).parent / "text.safetensors"
