"""PowerAttention: blocks of keys at distances that are powers of two."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlm_prune.pruning.attention.inputs import AttentionInputs
from vlm_prune.pruning.attention.local import Local


@dataclass
class PowerAttention(Local):
    """Keep blocks of keys at 1, 2, 4, 8 ... blocks' distance, and a window.

    https://arxiv.org/abs/2503.03588

    What a token sees doubles with each layer. The paper trains the model with the pattern, in blocks
    of 256; without training it is a control. A `density` above that of the pattern widens the window.

    Args:
        window: tokens of the window without a `density`.
    """

    window: int = 1280
    paper: ClassVar[str] = "https://arxiv.org/abs/2503.03588"

    def pattern(self, inputs: AttentionInputs, blocks: float) -> Tensor:
        """Returns the blocks whose distance is a power of two, (1, blocks, blocks)."""
        distance = self.distances(inputs)[None]
        return (distance > 0) & (distance & (distance - 1) == 0)

    def choose(self, inputs: AttentionInputs) -> Tensor:
        return super().choose(inputs) | self.pattern(inputs, 0.0)
