"""Mean pooling: the products of the mean queries and mean keys of blocks."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vlm_prune.pruning.attention.base import BlockAttention, kept_mass
from vlm_prune.pruning.attention.inputs import AttentionInputs, blocks_before


@dataclass
class Pooled(BlockAttention):
    """Keep the blocks of keys to which the mean query of a block pays most, at their mean keys.

    The estimate that block-sparse methods of attention have in common; FlexPrefill and others begin
    with it (https://arxiv.org/abs/2502.20766).

    Args:
        mass: without a `density`, the share of a query block's estimated attention that is kept.
    """

    mass: float = 0.95

    def weights(self, inputs: AttentionInputs) -> Tensor:
        """Returns the estimated attention between blocks, (H, blocks, blocks)."""
        query, key = inputs.block_means(self.block)
        scores = (query @ key[:, None].transpose(-1, -2) * inputs.scaling).flatten(0, 1)
        before = blocks_before(scores.shape[-1], scores.device)
        return scores.masked_fill(~before, -torch.inf).softmax(-1)

    def scores(self, inputs: AttentionInputs) -> Tensor:
        return self.shared(self.weights(inputs), inputs)

    def choose(self, inputs: AttentionInputs) -> Tensor:
        return kept_mass(self.weights(inputs), self.mass)
