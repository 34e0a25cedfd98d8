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
        heads, blocks = inputs.grouped.shape[1], inputs.length // self.block
        keys = inputs.key.unflatten(1, (-1, stride)).flatten(2)
        squares = keys.shape[1]
        found = torch.zeros(len(keys), heads, blocks, blocks, device=keys.device)
        # query blocks at a time: an eighth, so that with the keys before their end little more than the
        # causal half is computed, and key heads at a time, as many as may be held
        step = max(1, min(-(-blocks // 8), inputs.most // (heads * per_block * squares)))
        size = max(1, inputs.most // (heads * step * per_block * squares))
        later = torch.ones(
            step * per_block, step * per_block, dtype=torch.bool, device=keys.device
        ).triu(1)
        for group in range(0, len(keys), size):
            part = slice(group, group + size)
            # (G, H / G, squares, stride x d), from the last token of each square to its first
            query = inputs.grouped[part].unflatten(2, (-1, stride)).flip(3).flatten(3)
            key = keys[part].transpose(1, 2)
            for first in range(0, blocks, step):
                rows = slice(first * per_block, min(first + step, blocks) * per_block)
                scores = (query[:, :, rows].flatten(1, 2) @ key[..., : rows.stop]).float()
                # (G, H / G x rows, squares) -> (G, H / G, rows, squares)
                scores = scores.mul_(inputs.scaling / stride).unflatten(1, (heads, -1))
                own = scores[..., rows.start :]
                own.masked_fill_(later[: own.shape[2], : own.shape[2]], -torch.inf)
                # the mean over squares of a query block, summed over squares of a key block
                tiles = scores.softmax(-1).unflatten(2, (-1, per_block)).mean(3)
                tiles = tiles.unflatten(3, (-1, per_block)).sum(4)
                found[part, :, first : first + step, : tiles.shape[3]] = tiles
        return found.flatten(0, 1)

    def scores(self, inputs: AttentionInputs) -> Tensor:
        return self.shared(self.weights(inputs), inputs)

    def choose(self, inputs: AttentionInputs) -> Tensor:
        return kept_mass(self.weights(inputs), self.mass)
