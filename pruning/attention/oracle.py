"""The blocks of keys that attention itself pays most, as a control: what a better estimate could reach."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vlm_prune.pruning.attention.base import BlockAttention
from vlm_prune.pruning.attention.inputs import AttentionInputs


@dataclass
class OracleBlocks(BlockAttention):
    """Keep the blocks of keys that get most of a query block's attention, which is computed for it.

    It costs more than dense attention: a bound for methods that estimate this, not one of them.
    """

    def scores(self, inputs: AttentionInputs) -> Tensor:
        """Scores blocks by their share of a query block's attention, (R, blocks, blocks)."""
        blocks = inputs.length // self.block
        found = torch.zeros(inputs.heads, blocks, blocks, device=inputs.key.device)
        for number, weights in enumerate(inputs.block_rows(self.block)):
            paid = weights.mean(2).unflatten(2, (-1, self.block)).sum(3)
            found[:, number, : number + 1] = paid.flatten(0, 1)
        return self.shared(found, inputs)
