"""GLM-4.6V in transformers: GLM-4.1V's tower, merger and positions around the text model of its config."""

from dataclasses import dataclass

from vlm_prune.vlm.families.glm4v import Glm4v


@dataclass(frozen=True)
class Glm46V(Glm4v):
    """Paths into a `Glm46VForConditionalGeneration`."""
