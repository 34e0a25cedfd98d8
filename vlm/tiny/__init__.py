"""The embedded LLaVA: small enough for a laptop, trained to really see its own little world."""

from pathlib import Path


def checkpoint_path() -> Path:
    """The folder of the packaged checkpoint, for `from_pretrained`."""
    return Path(__file__).parent / "checkpoint"


def text_language_model() -> Path | None:
    """The packaged language model as it was before it saw images, in safetensors; None without one."""
    path = checkpoint_path() / "text.safetensors"
    return path if path.is_file() else None
