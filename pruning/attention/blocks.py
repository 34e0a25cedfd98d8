"""Which blocks of keys a block of queries computes: shapes, what all methods compute, budgets."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Geometry:
    """Shapes of a mask over a prompt of whole blocks.

    Tokens of one local region see each other causally; a mask speaks of keys before the region.

    Args:
        rows: queries of a query block.
        columns: keys of a key block; 1 for masks of single keys.
        local: tokens of a local region, a multiple of `rows` and of `columns`.
        block: of the grid of what all methods compute, which divides `local`.
    """

    rows: int
    columns: int
    local: int
    block: int

    def shape(self, length: int) -> tuple[int, int]:
        """Returns the query blocks and key blocks of a prompt, the last query block perhaps shorter."""
        return -(-length // self.rows), length // self.columns

    def starts(self, length: int, device: torch.device | None = None) -> Tensor:
        """Returns where the local region of each query block begins, (query blocks,)."""
        # a query block's first row, rounded down to a whole region
        blocks = torch.arange(self.shape(length)[0], device=device)
        return blocks * self.rows // self.local * self.local

    def candidates(self, length: int, device: torch.device | None = None) -> Tensor:
        """Returns which key blocks lie before each query block's local
        region, (query blocks, key blocks).
        """
        keys = torch.arange(self.shape(length)[1], device=device) * self.columns
        return keys < self.starts(length, device)[:, None]

    @property
    def sink(self) -> int:
        """Returns the key blocks of the first block, which all queries see."""
        return self.block // self.columns

    def row_counts(self, length: int) -> Tensor:
        """Returns how many queries each query block has, (query blocks,)."""
        rows = torch.full((self.shape(length)[0],), self.rows)
        rows[-1] = length - (len(rows) - 1) * self.rows
        return rows

    def open_blocks(self, density: float, tokens: int, length: int) -> float:
        """Returns how many key blocks, counted once for each query, a mask may keep that not all methods
        compute, for the whole to be a share of the causal half.

        Args:
            density: that share.
            tokens: of the prompt.
            length: tokens before its tail.
        """
        # regions, the tail, and the first block before each region, which all methods compute
        fixed = local_products(length, self.local) + tail_products(tokens, length)
        fixed += int((self.starts(length).clamp(max=self.block) * self.row_counts(length)).sum())
        return max(0.0, density * (tokens * (tokens + 1) // 2) - fixed) / self.columns


def local_products(length: int, local: int) -> int:
    """Returns the products of queries with keys of their own local region, up to their own.

    Args:
        length: tokens.
        local: tokens of a region; the last one may be shorter.
    """
    # each region is a triangle with its diagonal
    whole, rest = divmod(length, local)
    return whole * (local * (local + 1) // 2) + rest * (rest + 1) // 2


def tail_products(tokens: int, length: int) -> int:
    """Returns the products of the queries from token `length` on with all keys up to their own."""
    return tokens * (tokens + 1) // 2 - length * (length + 1) // 2


def body_length(tokens: int, tail: int, block: int) -> int:
    """Returns how many tokens, whole blocks of them, stand before a prompt's tail.

    Args:
        tokens: of the prompt.
        tail: rows at its end that see all keys.
        block: tokens of a block.
    """
    return max(0, tokens - tail) // block * block


@dataclass(frozen=True)
class KeptBlocks:
    """Which key blocks before its local region each query block computes.

    Args:
        keep: (R, query blocks, key blocks); R masks, for all heads, each key head, or each head.
        geometry: its shapes.
    """

    keep: Tensor
    geometry: Geometry

    def forced(self, length: int) -> "KeptBlocks":
        """Returns the mask with the first blocks of keys added for all queries."""
        keep = self.keep.clone()
        keep[..., : self.geometry.sink] = True
        keep &= self.geometry.candidates(length, keep.device)
        return replace(self, keep=keep)

    def products(self, length: int) -> Tensor:
        """Returns how many products of queries and keys a head
        computes, (), local regions included.
        """
        # key blocks of each query block times its rows, the mean over masks
        rows = self.geometry.row_counts(length).to(self.keep.device)
        per_mask = (self.keep.sum(-1) * rows).sum(-1).double().mean()
        return per_mask * self.geometry.columns + local_products(length, self.geometry.local)

    def coarse(self, length: int) -> "KeptBlocks":
        """Returns the mask on the grid of blocks: a block is kept where any part of
        it is, or is in a local region.

        Args:
            length: tokens of the prompt, whole blocks of them.
        """
        geometry, block = self.geometry, self.geometry.block
        if (geometry.rows, geometry.columns, geometry.local) == (block,) * 3:
            return self
        blocks = length // block
        # finer columns and rows are joined, coarser rows repeated
        keep = self.keep.unflatten(-1, (blocks, -1)).any(-1)
        if geometry.rows <= block:
            keep = keep.unflatten(1, (blocks, -1)).any(2)
        else:
            keep = keep.repeat_interleave(geometry.rows // block, 1)[:, :blocks]
        # blocks of the same local region, before each query's own
        region = torch.arange(blocks, device=keep.device) * block // geometry.local
        keep = keep | (region == region[:, None])
        fine = Geometry(block, block, block, block)
        return KeptBlocks(keep & fine.candidates(length, keep.device), fine)


def row_budgets(geometry: Geometry, length: int, blocks: float) -> tuple[Tensor, Tensor]:
    """Returns which key blocks each query block may choose, and how many it may keep: the same share.

    Args:
        geometry: shapes of a mask.
        length: tokens of the prompt.
        blocks: how many may be kept in all, counted once for each query.
    """
    may = geometry.candidates(length)
    may[:, : geometry.sink] = False
    choices, rows = may.sum(1).double(), geometry.row_counts(length)
    share = min(1.0, blocks / max(1.0, float((choices * rows).sum())))
    # rounding what all query blocks so far keep leaves no error in the sum
    counts = (share * choices.cumsum(0) + 1e-9).floor().diff(prepend=torch.zeros(1).double())
    return may, counts.long()


def top_blocks(scores: Tensor, geometry: Geometry, blocks: float) -> Tensor:
    """Returns the key blocks with the highest scores, each query block the same share of those that it
    may choose, (R, query blocks, key blocks).

    Args:
        scores: (R, query blocks, key blocks); R masks, for all heads, each key head, or each head.
        geometry: their shapes.
        blocks: how many key blocks may be kept, summed over all queries, not over query blocks.
    """
    may, counts = row_budgets(geometry, scores.shape[-1] * geometry.columns, blocks)
    may, counts = may.to(scores.device), counts.to(scores.device)
    # each row's first `counts` in order of scores, written back to their columns
    order = scores.masked_fill(~may, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(scores.shape[-1], device=scores.device)
    keep = (ranks < counts[:, None]).expand(scores.shape)
    return torch.zeros_like(keep).scatter(-1, order, keep)


def nearest_blocks(kept: Tensor, geometry: Geometry, blocks: float) -> Tensor:
    """Returns a pattern with as many of the nearest key blocks added as the budget allows: a window.

    Args:
        kept: the pattern, (R, blocks, blocks), of square blocks.
        geometry: its shapes.
        blocks: how many may be kept in all, counted once for each query.
    """
    length = kept.shape[-1] * geometry.columns
    may = geometry.candidates(length, kept.device)
    may[:, : geometry.sink] = False
    kept = kept & may
    index = torch.arange(kept.shape[-1], device=kept.device)
    # how many blocks a key block stands before a query block
    distance = index[:, None] - index
    added = may & ~kept
    # blocks that each distance would add to a mask, the nearest first
    counts = torch.zeros(len(index), dtype=torch.double, device=kept.device)
    counts.scatter_add_(
        0,
        distance.clamp(min=0).expand(kept.shape)[added],
        counts.new_ones(1).expand(int(added.sum())),
    )
    # what windows of 1, 2, ... blocks cost with the pattern, a mean over masks
    whole = (counts.cumsum(0) / len(kept) + kept.sum().double() / len(kept)) * geometry.rows
    window = int((whole <= blocks + 1e-9).sum())
    return kept | (may & (distance < window))
