"""Queries and keys of one prompt in one layer, as methods of sparse attention see them."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionInputs:
    """Queries and keys of the tokens before a prompt's tail, without padding; whole blocks of them.

    Args:
        query: (H, n, d), after rotation.
        key: (G, n, d), likewise.
        scaling: factor of the products.
        layer: number of the decoder layer, from 0.
        tokens: of the prompt, its tail included.
        rotary: cosines and sines of the tokens' positions, (2, n, r); None unless they are read.
        most: products of queries and keys that an estimate may hold at a time.
        frames: the image or frame of each token, -1 for text, (n,); None where it is not known.
    """

    query: Tensor
    key: Tensor
    scaling: float
    layer: int
    tokens: int
    rotary: Tensor | None = None
    most: int = 1 << 19
    frames: Tensor | None = None

    @property
    def heads(self) -> int:
        """Returns the number of query heads, H."""
        return len(self.query)

    @property
    def groups(self) -> int:
        """Returns the number of key heads, G."""
        return len(self.key)

    @property
    def length(self) -> int:
        """Returns the number of tokens, n."""
        return self.key.shape[1]

    @cached_property
    def grouped(self) -> Tensor:
        """Returns the queries by key head, (G, H / G, n, d)."""
        grouped: Tensor = self.query.unflatten(0, (self.groups, -1))
        return grouped

    def block_means(self, block: int) -> tuple[Tensor, Tensor]:
        """Returns the means of queries (G, H / G, n / block, d) and keys (G, n / block, d), in fp32."""
        query = self.grouped.unflatten(2, (-1, block)).mean(3, dtype=torch.float32)
        return query, self.key.unflatten(1, (-1, block)).mean(2, dtype=torch.float32)

    def block_rows(self, block: int) -> Iterator[Tensor]:
        """Yields the causal attention of each block of queries to the keys up to its end,
        (G, H / G, block, keys), in fp32.
        """
        index = torch.arange(self.length, device=self.key.device)
        key = self.key[:, None].float().transpose(-1, -2)
        for end in range(block, self.length + 1, block):
            rows = slice(end - block, end)
            scores = self.grouped[:, :, rows].float() @ key[..., :end] * self.scaling
            later = index[:end] > index[rows, None]
            yield scores.masked_fill(later, -torch.inf).softmax(-1)


def blocks_before(blocks: int, device: torch.device) -> Tensor:
    """Returns which blocks stand before each block or are that block itself, (blocks, blocks)."""
    return torch.ones(blocks, blocks, dtype=torch.bool, device=device).tril()
