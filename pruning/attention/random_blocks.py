"""Blocks of keys drawn at random, as a control."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vlm_prune.pruning.attention.base import BlockAttention
from vlm_prune.pruning.attention.inputs import AttentionInputs


@dataclass
class RandomBlocks(BlockAttention):
    """Keep blocks of keys drawn at random, others in each layer and for each mask.

    They depend on `seed`, the layer and the prompt's length alone.
    """

    def scores(self, inputs: AttentionInputs) -> Tensor:
        """Scores blocks by uniform random numbers, (R, query blocks, key blocks)."""
        masks = inputs.heads if self.share == "head" else inputs.groups
        draw = torch.Generator().manual_seed(self.seed * 100_003 + inputs.layer)
        shape = self.geometry(inputs).shape(inputs.length)
        return torch.rand(masks, *shape, generator=draw).to(inputs.key.device)
