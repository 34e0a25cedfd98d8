"""BlockRank's mask: an image or frame sees the instruction and itself."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlm_prune.pruning.attention.base import SparseAttention
from vlm_prune.pruning.attention.inputs import AttentionInputs
from vlm_prune.pruning.attention.local import Local


@dataclass
class OwnFrame(Local):
    """Keep the blocks of keys of a query block's own image or frame, and of some before it.

    https://arxiv.org/abs/2510.05396

    The paper trains a language model so, with documents for images, and ranks by its attention; the
    question sees all, as with all methods here. Positions stay. Text goes with the image before it. A
    `density` above that of the pattern adds a window; where tokens have been dropped there is only the
    window.

    Args:
        window: tokens of a window beside it, without a `density`.
        previous: images or frames before its own that a query block sees, too.
    """

    window: int = 128
    previous: int = 0
    paper: ClassVar[str] = "https://arxiv.org/abs/2510.05396"
    reads_frames: ClassVar[bool] = True
    from_zero: ClassVar[frozenset[str]] = SparseAttention.from_zero | {"previous"}

    def pattern(self, inputs: AttentionInputs, blocks: float) -> Tensor:
        """Returns the blocks that hold tokens of a query block's frames or of the
        `previous` ones before, (1, blocks, blocks).
        """
        distance = self.distances(inputs)[None]
        if inputs.frames is None:
            return distance < 0
        frames = inputs.frames.to(distance.device).cummax(0).values.unflatten(0, (-1, self.block))
        first, last = frames[:, 0], frames[:, -1]
        seen: Tensor = (distance >= 0) & (last >= first[:, None] - self.previous)
        return seen

    def choose(self, inputs: AttentionInputs) -> Tensor:
        return super().choose(inputs) | self.pattern(inputs, 0.0)
