"""XAttention: sums of antidiagonals stand for blocks."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlm_prune.pruning.attention.base import BlockAttention, kept_mass
from vlm_prune.pruning.attention.inputs import AttentionInputs
from vlm_prune.vlm.common.errors import InputError


@dataclass
class XAttention(BlockAttention):
    """Keep the blocks whose antidiagonals, one of `stride`, sum up to most attention.

    https://arxiv.org/abs/2503.16428

    Queries and keys at every `stride`-th token are put side by side, queries in reverse, so that a
    product is the sum of an antidiagonal of a square of `stride` tokens. The released code forces
    the first row of blocks where its paper has the first column; here it is the column.

    Args:
        stride: tokens of a square; divides `block`.
        mass: without a `density`, the share of a query block's estimated attention that is kept.
    """

    stride: int = 16
    mass: float = 0.9
    paper: ClassVar[str] = "https://arxiv.org/abs/2503.16428"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block % self.stride:
            raise InputError(f"stride {self.stride} does not divide blocks of {self.block} tokens")

    def weights(self, inputs: AttentionInputs) -> Tensor:
        """Returns the estimated attention between blocks, (H, blocks, blocks)."""
        stride, per_block = self.stride, self.block // self.stride
        blocks = inputs.length // self.block
        # (G, H / G, squares, stride x d), queries from the last token of each square to its first
        query = inputs.grouped.unflatten(2, (-1, stride)).flip(3).flatten(3)
        key = inputs.key.unflatten(1, (-1, stride)).flatten(2)
        squares = query.shape[2]
        index = torch.arange(squares, device=key.device)
        found = torch.zeros(inputs.heads, blocks, blocks, device=key.device)
        # as many query blocks at a time as may be held, and the keys before their end
        step = max(1, inputs.most // (inputs.heads * per_block * squares))
        for first in range(0, blocks, step):
            rows = slice(first * per_block, min(first + step, blocks) * per_block)
            seen = index[: rows.stop]
            scores = query[:, :, rows].flatten(1, 2) @ key[:, : rows.stop].transpose(1, 2)
            # (G, H / G x rows, squares) -> (G, H / G, rows, squares)
            scores = scores.float().unflatten(1, (-1, rows.stop - rows.start))
            scores = scores * (inputs.scaling / stride)
            scores = scores.masked_fill(seen > index[rows, None], -torch.inf).softmax(-1)
            # attention between squares, summed over those of each block of keys, then of queries
            tiles = scores.flatten(0, 1).unflatten(2, (-1, per_block)).sum(3)
            tiles = tiles.unflatten(1, (-1, per_block)).sum(2)
            found[:, first : first + step, : tiles.shape[2]] = tiles
        return found / per_block

    def scores(self, inputs: AttentionInputs) -> Tensor:
        return self.shared(self.weights(inputs), inputs)

    def choose(self, inputs: AttentionInputs) -> Tensor:
        return kept_mass(self.weights(inputs), self.mass)
