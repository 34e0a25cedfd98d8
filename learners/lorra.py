"""Low-rank residual attention (LoRRA), the learner of Wings.

https://arxiv.org/abs/2406.03496, equation 4
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import rotate_half

from vlm_prune.learners.tokens import Keys, Run

Rotary = tuple[Tensor, Tensor]


def rotated(heads: Tensor, rotary: Rotary) -> Tensor:
    """Rotary position embedding of (B, H, N, d) with cos and sin tables (B or 1, N, d)."""
    cos, sin = (table[:, None].to(heads.dtype) for table in rotary)
    turned: Tensor = heads * cos + rotate_half(heads) * sin
    return turned


def attend(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, dropout: float = 0.0
) -> Tensor:
    """Attention that gives zero, not a uniform mean, to a query with no visible key.

    Shapes: query (B, H, S, d), key and value (B, H, M, d), visible (B, S, M) -> (B, H, S, d).
    """
    empty = ~visible.any(-1, keepdim=True)
    output = F.scaled_dot_product_attention(
        query, key, value, (visible | empty)[:, None], dropout_p=dropout
    )
    return output.masked_fill(empty[:, None], 0)


def attend_runs(
    query: Tensor, key: Tensor, value: Tensor, runs: tuple[Run, ...], dropout: float = 0.0
) -> Tensor:
    """`attend`, run by run without the keys that a run does not see; shapes as there."""
    outputs = []
    for start, stop, before, own in runs:
        part, seen = query[:, :, start:stop], before + (stop - start if own else 0)
        if not seen:
            outputs.append(torch.zeros_like(part))
            continue
        square = own and not before
        mask = None
        if own and before and stop - start > 1:
            shape = stop - start, seen
            mask = torch.ones(shape, dtype=torch.bool, device=part.device).tril(before)
        outputs.append(
            F.scaled_dot_product_attention(
                part, key[:, :, :seen], value[:, :, :seen], mask, dropout, is_causal=square
            )
        )
    return torch.cat(outputs, 2)


class LowRank(nn.Module):
    """x -> x W_a W_b with W_a (D, rank) Gaussian and W_b (rank, D) zero, so that it starts at 0."""

    def __init__(self, width: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width, bias=False)
        with torch.no_grad():
            self.down.weight.normal_(0, 0.02, generator=generator)
            self.up.weight.zero_()

    def forward(self, hidden: Tensor) -> Tensor:
        """Shapes: (..., D) -> (..., D)."""
        mapped: Tensor = self.up(self.down(hidden))
        return mapped

    def added(self, hidden: Tensor) -> Tensor:
        """x (I + W) in one pass over the wide tensor; (B, N, D) -> (B, N, D)."""
        inner = self.down(hidden)
        summed = torch.addmm(hidden.flatten(0, 1), inner.flatten(0, 1), self.up.weight.T)
        return summed.view_as(hidden)


class LoRRA(nn.Module):
    """Every token's attention over one modality's input features.

    Q = h (I + W^Q), K = x (I + W^K), V = x (I + W^V), each W of low rank; the output map is of low
    rank without an identity, so an untrained learner gives exactly 0. Because of the identities
    keys and values are as wide as the hidden states, whatever grouping the main attention uses:
    there are D / head_dim heads. With a cache they are kept like those of the main attention, and
    every token has them in one learner of a layer; without, or where a row's tokens do not simply
    go on, they are made of the features anew, which costs 4 M D rank products for M keys.

    Args:
        width: D, of the hidden states.
        head_dim: width of one head, that of the main attention.
        rank: inner width of the four maps.
        dropout: of attention weights, in training; the main attention's.
        generator: draws the initial weights.
    """

    def __init__(
        self, width: int, head_dim: int, rank: int, dropout: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.head_dim, self.dropout = head_dim, dropout
        self.query, self.key, self.value, self.output = (
            LowRank(width, rank, generator) for _ in range(4)
        )

    def forward(self, hidden: Tensor, keys: Keys, rotary: Rotary | None) -> Tensor:
        """Shapes: hidden (B, S, D), `rotary` cos and sin (B or 1, S, head_dim) -> (B, S, D)."""
        query = self._heads(self.query.added(hidden))
        key, value = self._keys_and_values(keys, rotary is not None)
        if rotary is not None:
            query = rotated(query, rotary)
        dropout = self.dropout if self.training else 0.0
        if keys.runs is None:
            attended = attend(query, key, value, keys.visible, dropout)
        else:
            attended = attend_runs(query, key, value, keys.runs, dropout)
        mixed: Tensor = self.output(attended.transpose(1, 2).flatten(2))
        return mixed

    def _keys_and_values(self, keys: Keys, rotate: bool) -> tuple[Tensor, Tensor]:
        made = None if keys.made is None else keys.made.by_learner.get(self)
        known = 0 if made is None or made[0].shape[2] != keys.known else keys.known
        features = keys.features[:, known:]
        if made is not None and known and not features.shape[1]:
            return made
        key = self._heads(self.key.added(features))
        value = self._heads(self.value.added(features))
        if rotate:
            cos, sin = keys.rotary
            key = rotated(key, (cos[:, known:], sin[:, known:]))
        if made is not None and known:
            key, value = torch.cat([made[0], key], 2), torch.cat([made[1], value], 2)
        if keys.made is not None:
            keys.made.by_learner[self] = key, value
        return key, value

    def _heads(self, hidden: Tensor) -> Tensor:
        heads: Tensor = hidden.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return heads
