"""The embedded CLIP: small enough for two CPU cores, and partly ignorant of each embedded domain."""

from pathlib import Path


def clip_checkpoint_path() -> Path:
    """Returns the packaged checkpoint;
    `open_clip.create_model_and_transforms(f"local-dir:{...}")` reads it.
    """
    return Path(__file__).parent / "checkpoint"
