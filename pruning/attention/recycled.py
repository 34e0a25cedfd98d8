"""Recycled Attention: decoding over the keys that one full step found."""

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlm_prune.pruning.attention.base import SparseAttention
from vlm_prune.pruning.attention.engine import MethodRun
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.families import family_of
from vlm_prune.vlm.layer_pruning import held_keys
from vlm_prune.vlm.sparse_attention import AttentionCall


@dataclass
class Recycled(SparseAttention):
    """Decode over the keys that the last full step paid most, and a full step now and then.

    https://arxiv.org/abs/2411.05787

    The prefill is SDPA's; what its last row pays each key chooses the first keys, the largest over
    the heads that share a key head. Each new key takes the place of the lowest ranked one. A cache
    whose rows change their order, or that loses tokens, gets a full step. No memory is saved.

    Args:
        density: keys that a step reads, as a share of those that there are at a full step; None for
            `keep` of them.
        keep: keys that a step reads, without a `density`.
        refresh: steps from one full step to the next.
    """

    keep: int = 4096
    refresh: int = 50
    paper: ClassVar[str] = "https://arxiv.org/abs/2411.05787"

    def admit(self, model: Any) -> None:
        """Raises `InputError` for models that lack SDPA, or whose learners read attention, too."""
        super().admit(model)
        if getattr(family_of(model).model, "wings", None) is not None:
            raise InputError(
                "recycled attention and Wings' learners both need each decoding step's attention to "
                "themselves; detach the learners"
            )

    def run(self) -> "RecycledRun":
        """Returns the run that computes attention in one `with` block."""
        return RecycledRun(self)

    def count(self, keys: int) -> int:
        """Returns how many of `keys` keys a step reads."""
        return self.keep if self.density is None else ceil(self.density * keys)


@dataclass
class RecycledKeys:
    """The keys that a layer's steps read, best ranked first.

    Args:
        key: (B, G, k, d).
        value: (B, G, k, v).
        bias: minus infinity where a row has no key, (B, G, 1, k).
        last: the newest key of all, (B, G, d).
        length: of the cache that they were taken from, with what steps have added since.
        steps: since then.
    """

    key: Tensor
    value: Tensor
    bias: Tensor
    last: Tensor
    length: int
    steps: int = 0


@dataclass
class RecycledRun(MethodRun):
    """Computes the attention of new tokens to part of the keys.

    Args:
        method: its hyperparameters.
        trace: what was computed.
        sets: keys of each layer, for each cache.
    """

    method: Recycled
    sets: weakref.WeakKeyDictionary[Any, dict[int, RecycledKeys]] = field(
        default_factory=weakref.WeakKeyDictionary
    )

    def prefill(self, call: AttentionCall) -> Tensor | None:
        """Chooses keys by the last row of a prefill, and returns None
        to leave the prefill to SDPA.
        """
        if self.applies(call):
            last = call.query[:, :, -1:]
            if call.valid is not None:
                # each row's last real token, where padding is on the right
                index = torch.arange(call.valid.shape[1], device=last.device)
                ends = (index * call.valid).argmax(1)
                last = call.query[torch.arange(len(ends)), :, ends][:, :, None]
            self.sets.setdefault(call.cache, {})[call.layer] = self.chosen(
                call, weights_of(call, last)
            )
        return None

    def applies(self, call: AttentionCall) -> bool:
        """Returns whether a layer's decoding steps read a part of the keys."""
        method, keys = self.method, call.key.shape[2]
        return (
            call.cache is not None
            and call.layer >= method.dense_layers
            and keys >= method.minimum
            and method.count(keys) < keys
        )

    def chosen(self, call: AttentionCall, weights: Tensor) -> RecycledKeys:
        """Returns copies of the keys and values that one row of attention weighs most.

        Args:
            call: whose keys they are.
            weights: of the row, (B, G, H / G, K).
        """
        count = self.method.count(call.key.shape[2])
        # the keys with most weight in any head of the group, (B, G, k)
        index = weights.amax(2).topk(count, -1).indices
        # padding may be among them: its bias hides it
        valid = index >= 0 if call.valid is None else call.valid[:, None].expand(
            -1, index.shape[1], -1
        ).gather(2, index)  # fmt: skip
        bias = torch.zeros(index.shape, dtype=call.key.dtype, device=index.device)
        # copies, so that a step reads no other key of the cache
        key, value = (
            tensor.gather(2, index[..., None].expand(-1, -1, -1, tensor.shape[3]))
            for tensor in (call.key, call.value)
        )
        return RecycledKeys(
            key, value, bias.masked_fill(~valid.bool(), -torch.inf)[:, :, None],
            call.key[:, :, -1].clone(), call.key.shape[2],
        )  # fmt: skip

    @torch.no_grad()
    def decode(self, call: AttentionCall) -> Tensor | None:
        """Returns a step's attention (B, 1, H, v), over few keys or, in a full step, over all; None where
        it is SDPA's.
        """
        if not self.applies(call):
            return None
        # a set of keys serves the next token only where nothing else went into the cache
        sets, keys = self.sets.setdefault(call.cache, {}), call.key.shape[2]
        known = sets.get(call.layer)
        current = known is not None and known.length == keys - 1
        if current and call.layer == min(sets) and moved(call, sets):
            sets.clear()
            current = False
        # a full step reads all keys, and chooses anew
        if known is None or not current or known.steps >= self.method.refresh - 1:
            weights = weights_of(call, call.query)
            sets[call.layer] = self.chosen(call, weights)
            self.trace.decoded += keys
            self.trace.decodable += keys
            return joined_heads(weights @ call.value)
        # the new key takes the place of the one with least weight, from the end on
        slot = known.key.shape[2] - 1 - known.steps % known.key.shape[2]
        known.key[:, :, slot], known.value[:, :, slot] = call.key[:, :, -1], call.value[:, :, -1]
        known.bias[..., slot] = 0
        known.last, known.length, known.steps = call.key[:, :, -1].clone(), keys, known.steps + 1
        self.trace.decoded += known.key.shape[2]
        self.trace.decodable += keys
        scores = grouped_query(call, call.query) @ known.key.transpose(-1, -2) * call.scaling
        weights = (scores + known.bias).softmax(-1, dtype=torch.float32).to(call.value.dtype)
        return joined_heads(weights @ known.value)


def moved(call: AttentionCall, sets: Mapping[int, RecycledKeys]) -> bool:
    """Returns whether beam search has reordered a cache: whether its last keys differ from those read
    last, in the deepest layer that tells.

    Keys of the first layer are those of tokens alone, which rows that end alike share.

    Args:
        call: of the first of the layers, whose cache holds a new token.
        sets: keys of each layer.
    """
    deepest = max(sets)
    key = None if deepest == call.layer else held_keys(call.cache, deepest)
    if key is None:
        deepest, key = call.layer, call.key[:, :, :-1]
    last, newest = sets[deepest].last, key[:, :, -1]
    return last.shape != newest.shape or not torch.equal(last, newest.to(last.device))


def grouped_query(call: AttentionCall, query: Tensor) -> Tensor:
    """Returns one row's queries (B, H, 1, d) by key head, (B, G, H / G, d)."""
    grouped: Tensor = query.unflatten(1, (call.key.shape[1], -1)).squeeze(3)
    return grouped


def weights_of(call: AttentionCall, query: Tensor) -> Tensor:
    """Returns what one row pays all keys, (B, G, H / G, K).

    Args:
        call: whose keys they are.
        query: of the row, (B, H, 1, d).
    """
    scores = grouped_query(call, query) @ call.key.transpose(-1, -2) * call.scaling
    if call.valid is not None:
        scores = scores.masked_fill(~call.valid.bool()[:, None, None], -torch.inf)
    return scores.softmax(-1, dtype=torch.float32).to(call.value.dtype)


def joined_heads(output: Tensor) -> Tensor:
    """Returns (B, G, H / G, v) as the attention of one row, (B, 1, H, v)."""
    return output.flatten(1, 2)[:, None]
