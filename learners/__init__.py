"""Wings: learners that keep a language model's text skills while it learns to see."""

from vlm_prune.learners.config import WingsConfig
from vlm_prune.learners.model import attach, detach
from vlm_prune.learners.store import from_pretrained, save_pretrained

__all__ = ["WingsConfig", "attach", "detach", "from_pretrained", "save_pretrained"]
