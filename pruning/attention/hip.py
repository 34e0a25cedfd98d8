"""HiP: a tree over the keys, of which the best halves are opened."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlm_prune.pruning.attention.base import BlockAttention
from vlm_prune.pruning.attention.blocks import Geometry, row_budgets
from vlm_prune.pruning.attention.inputs import AttentionInputs
from vlm_prune.vlm.common.errors import InputError


@dataclass
class HiP(BlockAttention):
    """Keep units of keys that a search by halves finds, of which each half is judged by its first unit.

    https://arxiv.org/abs/2406.09827

    The keys before a query block are split into as many ranges as units may stay. Then all ranges are
    halved, and of the halves the best ones stay, until each is a unit. A half scores the largest product
    of every second row of the query block with its first unit's keys. Query blocks are half of a
    `block`, units a sixteenth; the paper's are 32 queries and 2 keys.

    Args:
        keys: without a `density`, the keys that each query block keeps.
    """

    keys: int = 512
    paper: ClassVar[str] = "https://arxiv.org/abs/2406.09827"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block % 16 and self.block != 8:
            raise InputError(f"HiP splits blocks in 16; {self.block} tokens are no multiple of it")

    def geometry(self, inputs: AttentionInputs) -> Geometry:
        return Geometry(self.block // 2, max(1, self.block // 16), self.block, self.block)

    def scores(self, inputs: AttentionInputs) -> Tensor:
        """Raises NotImplementedError: what is kept follows from the search."""
        raise NotImplementedError

    def choose(self, inputs: AttentionInputs) -> Tensor:
        geometry = self.geometry(inputs)
        rows = geometry.shape(inputs.length)[0]
        return self.found(inputs, torch.full((rows,), -(-self.keys // geometry.columns)))

    def at_density(self, inputs: AttentionInputs, blocks: float) -> Tensor:
        _, counts = row_budgets(self.geometry(inputs), inputs.length, blocks)
        return self.found(inputs, counts)

    def found(self, inputs: AttentionInputs, counts: Tensor) -> Tensor:
        """Returns the units that the search finds, a mask (R, query blocks, units).

        Args:
            inputs: queries and keys.
            counts: units that each query block keeps beside the first block, (query blocks,).
        """
        geometry = self.geometry(inputs)
        blocks, units = geometry.shape(inputs.length)
        masks = inputs.heads if self.share == "head" else inputs.groups
        # every second row of each query block, of all heads that share a mask: (R, blocks, rows, d)
        query = inputs.query.unflatten(0, (masks, -1)).unflatten(2, (blocks, geometry.rows))
        query = query[:, :, :, ::2].transpose(1, 2).flatten(2, 3)
        keys = inputs.key.unflatten(1, (units, geometry.columns))
        keys = keys.repeat_interleave(masks // inputs.groups, 0)
        starts = geometry.starts(inputs.length) // geometry.columns
        found = torch.zeros(masks, blocks, units, dtype=torch.bool, device=keys.device)
        most = int(counts.max())
        if most == 0:
            return found
        held = masks * 2 * most * geometry.columns * max(query.shape[2], query.shape[3])
        size = max(1, inputs.most // held)
        for begin in range(0, blocks, size):
            part = slice(begin, begin + size)
            chosen = search(
                query[:, part],
                keys,
                starts[part].to(keys.device),
                counts[part].to(keys.device),
                geometry.sink,
            )
            # the last place stands for ranges that are none
            kept = torch.zeros(*chosen.shape[:2], units + 1, dtype=torch.bool, device=keys.device)
            found[:, part] = kept.scatter_(-1, chosen, True)[..., :units]
        return found


def search(query: Tensor, keys: Tensor, ends: Tensor, counts: Tensor, first: int) -> Tensor:
    """Returns the units that each query block keeps, (R, blocks, k), padded with the number of units.

    Args:
        query: rows that are read, (R, blocks, rows, d).
        keys: (R, units, keys of a unit, d).
        ends: before which unit each query block's ranges end, (blocks,).
        counts: how many units each query block keeps, (blocks,); k is the largest.
        first: unit with which ranges begin.
    """
    masks, units = keys.shape[:2]
    most, lengths = max(1, int(counts.max())), (ends - first).clamp(min=0)
    place = torch.arange(most, device=keys.device)
    # ranges of nearly equal length; those behind the last one are empty
    parts = counts.clamp(min=1)[:, None]
    low = first + (lengths[:, None] * place // parts)
    high = first + (lengths[:, None] * (place + 1) // parts)
    real = place < counts[:, None]
    low, high = (torch.where(real, bound, first).expand(masks, -1, -1) for bound in (low, high))
    # each mask indexes its own keys
    owner = torch.arange(masks, device=keys.device)[:, None, None]
    while int((high - low).max()) > 1:
        # both halves of every range, each judged by its first unit
        middle = (low + high + 1) // 2
        begins, stops = torch.cat([low, middle], -1), torch.cat([middle, high], -1)
        judged = keys[owner, begins.clamp(max=units - 1)].flatten(2, 3)
        # (R, blocks, rows, ranges x keys): the largest product of any row with any key of the unit
        scores = (
            (query @ judged.transpose(-1, -2)).amax(2).unflatten(-1, (-1, keys.shape[2])).amax(-1)
        )
        scores = scores.float().masked_fill(begins >= stops, -torch.inf)
        order = scores.argsort(dim=-1, descending=True, stable=True)[..., :most]
        # of each query block no more ranges than it keeps
        low, high = (bound.gather(-1, order) for bound in (begins, stops))
        high = torch.where(place < counts[:, None], high, low)
    return torch.where(high > low, low, units)
