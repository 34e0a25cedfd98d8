"""A window: the keys nearest to each query, as a control."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vlm_prune.pruning.attention.base import BlockAttention
from vlm_prune.pruning.attention.blocks import nearest_blocks
from vlm_prune.pruning.attention.inputs import AttentionInputs


@dataclass
class Local(BlockAttention):
    """Keep the nearest blocks of keys, beside what all methods keep: a sink, a window, a dense tail.

    With `dense_layers` at half of the model's layers it is TriangleMix, with it at 0 Tri-shape.
    https://arxiv.org/abs/2507.21526, https://arxiv.org/abs/2412.10319

    Args:
        window: tokens of the window without a `density`, in whole blocks, a query's own among them.
    """

    window: int = 512

    def scores(self, inputs: AttentionInputs) -> Tensor:
        """Scores nearer keys higher, (1, query blocks, key blocks)."""
        return -self.distances(inputs)[None].float()

    def distances(self, inputs: AttentionInputs) -> Tensor:
        """Returns how many blocks each key block is before each query block,
        negative behind it; (query blocks, key blocks).
        """
        query, key = self.geometry(inputs).shape(inputs.length)
        index = torch.arange(max(query, key), device=inputs.key.device)
        return index[:query, None] - index[:key]

    def choose(self, inputs: AttentionInputs) -> Tensor:
        return self.distances(inputs)[None] < -(-self.window // self.block)

    def at_density(self, inputs: AttentionInputs, blocks: float) -> Tensor:
        """Returns the method's pattern with a window as wide as the density
        allows, (R, blocks, blocks).
        """
        return nearest_blocks(self.pattern(inputs, blocks), self.geometry(inputs), blocks)

    def pattern(self, inputs: AttentionInputs, blocks: float) -> Tensor:
        """Returns what is kept beside the window, (R, blocks, blocks); here nothing.

        Args:
            inputs: queries and keys.
            blocks: that may be kept in all.
        """
        return self.distances(inputs)[None] < 0
