"""Low-rank residual attention (LoRRA), the learner of Wings.

https://arxiv.org/abs/2406.03496, equation 4
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_prune.learners.columns import weights_of_one
from vlm_prune.learners.rotary import Rotary, rotated
from vlm_prune.learners.tokens import Keys, QueryRun
from vlm_prune.vlm.common.errors import InputError


def attend_visible(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, dropout: float = 0.0
) -> Tensor:
    """Returns attention that gives zero, not a uniform mean, to a query with no visible key, (B, S,
    H d).

    Args:
        query: (B, H, S, d).
        key: (B, H, M, d).
        value: (B, H, M, d).
        visible: which keys each query sees, (B, S, M).
        dropout: of attention weights.
    """
    # a row without keys would be NaN: it sees all, and its output is set to zero
    empty = ~visible.any(-1, keepdim=True)
    output = F.scaled_dot_product_attention(
        query, key, value, (visible | empty)[:, None], dropout_p=dropout
    )
    return output.transpose(1, 2).flatten(2).masked_fill(empty, 0)


def attend_runs(
    query: Tensor, key: Tensor, value: Tensor, runs: tuple[QueryRun, ...], dropout: float = 0.0
) -> Iterator[Tensor | int]:
    """Yields the attention of neighboring queries, (B, S', H d), or where they see no key their number S'.

    Together they are what `attend_visible` returns, without the keys that a run does not see.

    Args:
        query: (B, H, S, d).
        key: (B, H, M, d).
        value: (B, H, M, d).
        runs: what each run of queries sees; together they are all S queries.
        dropout: of attention weights.
    """
    left = list(runs)
    while left:
        start, stop, before, includes_itself = left.pop(0)
        # a run sees the keys before it, and its own causally if it is of the modality
        seen = before + (stop - start if includes_itself else 0)
        if not seen:
            yield stop - start
            continue
        square = includes_itself and not before
        if square and left and left[0].before == seen and not left[0].includes_itself:
            # the next run sees all of these keys: a causal mask that goes on below the square
            stop = left.pop(0).stop
        mask = None
        if includes_itself and before and stop - start > 1:
            shape = stop - start, seen
            mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril(before)
        part = F.scaled_dot_product_attention(
            query[:, :, start:stop], key[:, :, :seen], value[:, :, :seen], mask, dropout, square
        )
        yield part.transpose(1, 2).flatten(2)


def attend_one(
    query: Tensor, key: Tensor, features: Tensor, inner: Tensor, up: Tensor, visible: Tensor | None
) -> Tensor:
    """Returns the attention (B, 1, H d) of one query per row, with values x + u W_b that are never
    written out.

    A weighted mean of values is that of x plus that of u, mapped: the wide x are the same in all
    layers, so that a layer reads its keys and the narrow u.

    Args:
        query: (B, H, 1, d).
        key: (B, H, M, d).
        features: x, (B, H, M, d).
        inner: u, (B, M, rank).
        up: W_b^T, (H d, rank).
        visible: which keys the query sees, (B, 1, M); None for all.
    """
    batch, heads, _, width = query.shape
    mask = None if visible is None else visible[:, None]
    weights = weights_of_one(query, key, mask, width**-0.5)
    if mask is not None:
        weights = weights * mask
    # rows and heads are one dimension of products; (B, H, d) and (B, H, rank)
    means = torch.bmm(weights.flatten(0, 1), features.flatten(0, 1))
    attended, narrow = means.view(batch, heads, width), torch.bmm(weights[:, :, 0], inner)
    # W_b by heads, (H, rank, d)
    maps = up.view(heads, width, -1).transpose(1, 2)
    summed = torch.baddbmm(attended.transpose(0, 1), narrow.transpose(0, 1), maps)
    return summed.transpose(0, 1).flatten(1)[:, None]


class LowRankMap(nn.Module):
    """Map x to x W_a W_b with W_a (D, rank) Gaussian and W_b (rank, D) zero, so that it starts at
    0.

    Args:
        width: D.
        rank: inner width.
        generator: draws the initial weights.
    """

    def __init__(self, width: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width, bias=False)
        with torch.no_grad():
            self.down.weight.normal_(0, 0.02, generator=generator)
            self.up.weight.zero_()

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Maps (..., D) to rank and back to (..., D)."""
        mapped: Tensor = self.up(self.down(hidden_states))
        return mapped

    def added(self, hidden_states: Tensor) -> Tensor:
        """Returns x (I + W) in one pass over the wide tensor; (B, N, D) -> (B, N, D)."""
        return self.onto(hidden_states, self.down(hidden_states))

    def onto(self, wide: Tensor, inner: Tensor) -> Tensor:
        """Returns wide + inner W_b in one pass; (B, N, D), (B, N, rank) -> (B, N, D)."""
        summed = torch.addmm(wide.flatten(0, 1), inner.flatten(0, 1), self.up.weight.T)
        return summed.view_as(wide)


class LoRRA(nn.Module):
    """Every token's attention over one modality's input features.

    Q = h (I + W^Q), K = x (I + W^K), V = x (I + W^V), each W of low rank; the output map is of low
    rank without an identity, so an untrained learner gives exactly 0. Because of the identities
    keys and values are as wide as the hidden states, whatever grouping the main attention uses:
    there are D / head_dim heads. With a cache, keys are kept at that width, since rotation leaves
    them no low rank; values are kept as x, once for all layers, and `rank` numbers a layer.

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
            LowRankMap(width, rank, generator) for _ in range(4)
        )

    def forward(
        self,
        hidden_states: Tensor,
        keys: Keys,
        rotary: Rotary | None,
        weight: Tensor | float,
        total: Tensor,
    ) -> Tensor:
        """Returns `total` plus `weight` times the learner's attention, (B, S, D).

        Args:
            hidden_states: the layer's input, (B, S, D).
            keys: the modality's tokens.
            rotary: cos and sin of the queries, (B or 1, S, head_dim); None for no position
                rotation.
            weight: of the learner, (B, S, 1) or one for all.
            total: what the learner is added to, (B, S, D).
        """
        narrow = self._narrow(hidden_states, keys, rotary)
        return self.output.onto(total, narrow * weight)

    def _narrow(self, hidden_states: Tensor, keys: Keys, rotary: Rotary | None) -> Tensor:
        """Returns the attention of the learner's heads times W^O_a, (B, S, rank).

        Args:
            hidden_states: input of the layer, (B, S, D).
            keys: tokens of the modality.
            rotary: cos and sin of the queries; None for no position rotation.
        """
        query = self._heads(self.query.added(hidden_states), rotary)
        key, inner = self._keys_and_values(keys, rotary is not None)
        runs, dropout = keys.runs, self.dropout if self.training else 0.0
        if hidden_states.shape[1] == 1 and not dropout:
            # a single run sees all keys, but for the hidden one that stands where there is none
            visible = None if runs and keys.visible.shape[2] == sum(runs[0][2:]) else keys.visible
            up = self.value.up.weight
            return self._down(attend_one(query, key, keys.features, inner, up, visible))
        # values are the features and a low-rank part of them
        none_cached = keys.new.shape[1] == key.shape[2]
        features = keys.new if none_cached else keys.features.transpose(1, 2).flatten(2)
        value = self._heads(self.value.onto(features, inner), None)
        if runs is None:
            return self._down(attend_visible(query, key, value, keys.visible, dropout))
        parts = attend_runs(query, key, value, runs, dropout)
        return torch.cat([self._down_or_zero(part, hidden_states) for part in parts], 1)

    def _down(self, attended: Tensor) -> Tensor:
        narrow: Tensor = self.output.down(attended)
        return narrow

    def _down_or_zero(self, part: Tensor | int, like: Tensor) -> Tensor:
        """Maps a part of `attend_runs` to (B, S', rank): to zeros where it is a number of queries.

        Args:
            part: attention, or a number.
            like: of its batch, type and device, (B, S, D).
        """
        if isinstance(part, Tensor):
            return self._down(part)
        # one zero vector goes through the map, which thus takes part in the graph
        return self._down(torch.zeros_like(like[:, :1])).expand(-1, part, -1)

    def _keys_and_values(self, keys: Keys, rotate: bool) -> tuple[Tensor, Tensor]:
        """Returns keys (B, H, M, head_dim) and what values are made of, x W_a
        (B, M, rank), of all tokens so far.
        """
        cache = None if keys.cache is None else keys.cache.of(self)
        if cache is not None and len(cache[0]) + keys.new.shape[1] != keys.visible.shape[2]:
            raise InputError("this cache was filled with other learners; start an empty one")
        if cache is not None and not keys.new.shape[1]:
            return cache[0].tensor_so_far, cache[1].tensor_so_far
        # only new tokens are computed, and appended to the cache where there is one
        key = self._heads(self.key.added(keys.new), keys.rotary if rotate else None)
        inner = self.value.down(keys.new)
        return (key, inner) if cache is None else (cache[0].append(key), cache[1].append(inner))

    def _heads(self, hidden_states: Tensor, rotary: Rotary | None) -> Tensor:
        heads: Tensor = hidden_states.unflatten(-1, (-1, self.head_dim))
        return (heads if rotary is None else rotated(heads, rotary)).transpose(1, 2)
