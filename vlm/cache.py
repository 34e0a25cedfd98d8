"""The cache of decoders: its argument's name, and what a pruned prompt leaves in it.

After a cut the layers behind it hold fewer tokens than the layers in front. A cache that holds a
pruned prompt answers with the length of the full prompt, as if the dropped tokens had stood first
and left it, which is what a sliding window's cache says of the tokens that its window has passed.
So `generate`, assisted decoding and later turns count the full prompt.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from inspect import signature
from typing import Any, Self, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import create_causal_mask

from vlm_prune.vlm.common.errors import InputError

NAMES = ("cache", "past_key_values")
"""What callers may say: the name since transformers 5.24 and the one before."""
CACHE = next(name for name in NAMES if name in signature(create_causal_mask).parameters)
"""What the installed transformers calls it."""


def cache_of(kwargs: Mapping[str, Any]) -> Cache | None:
    """Returns the cache among a forward's keyword arguments, under either
    name; None if there is none.
    """
    return next((kwargs[name] for name in NAMES if kwargs.get(name) is not None), None)


@dataclass(frozen=True)
class CachedTokens:
    """The tokens that some decoder layers hold in a cache; tensors (B, K), on the host.

    Args:
        valid: whether it is a token, or padding.
        column: its column in the full prompt and what followed.
        shift: by how much lower its position is, tokens in front of it having been dropped.
        next_shift: the shift of tokens that follow, (B, 1).
        missing: by how many columns these layers are shorter than the full prompt.
        pruned: whether anything was dropped.
        sizes: as how many tokens attention counts each one, in the first layer and in the others,
            (2, B, K); None where all count as one.
    """

    valid: Tensor
    column: Tensor
    shift: Tensor
    next_shift: Tensor
    missing: int = 0
    pruned: bool = False
    sizes: Tensor | None = None

    @classmethod
    def whole(cls, valid: Tensor) -> Self:
        """Returns the tokens of a prompt of which nothing was dropped; `valid`
        (B, L) is false for padding.
        """
        column = torch.arange(valid.shape[1]).expand(len(valid), -1)
        nothing = torch.zeros_like(column)
        return cls(valid, column, nothing, torch.zeros(len(valid), 1, dtype=torch.long))

    def rows(self, index: Tensor) -> Self:
        """Returns the tokens of the rows at `index`."""
        return replace(
            self,
            valid=self.valid[index],
            column=self.column[index],
            shift=self.shift[index],
            next_shift=self.next_shift[index],
            sizes=None if self.sizes is None else self.sizes[:, index],
        )

    def crop(self, length: int) -> tuple[Self, int]:
        """Crops to the first `length` columns of the full prompt.

        Returns what is left, and how many columns the layers lose.

        Raises:
            InputError: when rows would lose different numbers of columns.
        """
        # tokens at or behind column `length`; all rows must lose the same number at their ends
        dropped = self.valid & (self.column >= length)
        count = int(dropped.sum(1).max()) if dropped.numel() else 0
        if count and not bool(dropped[:, -count:].all()):
            raise InputError("rows of this pruned prompt cannot be cropped to one length")
        kept = self.valid.shape[1] - count
        return replace(
            self,
            valid=self.valid[:, :kept],
            column=self.column[:, :kept],
            shift=self.shift[:, :kept],
            sizes=None if self.sizes is None else self.sizes[..., :kept],
            missing=length - kept,
        ), count


@dataclass
class CachedPrompt:
    """What a cache's layers hold of a pruned prompt.

    Args:
        length: tokens of the full prompt and what followed.
        layers: by the first of the layers that hold the same tokens.
        depth: decoder layers; what a cache holds beyond them is of full length.
        deltas: of positions with rows and columns, by how much the next token's is above the number
            of tokens, (B, 1); the model itself remembers those of its last prompt alone.
        open: whether a forward inside a pruning block is using the cache.
    """

    length: int
    layers: dict[int, CachedTokens]
    depth: int = 0
    deltas: Tensor | None = None
    open: bool = field(default=False, compare=False)

    def of(self, number: int) -> CachedTokens:
        """Returns the tokens that layer `number` holds."""
        return self.layers[max(first for first in self.layers if first <= number)]

    @property
    def batch(self) -> int:
        """Returns the number of rows of the prompt."""
        return len(self.layers[0].valid)

    def select(self, index: Tensor) -> None:
        """Keeps the rows at `index`, on the host."""
        self.layers = {first: tokens.rows(index) for first, tokens in self.layers.items()}
        if self.deltas is not None:
            self.deltas = self.deltas[index.to(self.deltas.device)]


class PrunedCache(Cache):  # type: ignore[misc]
    """What the class of a cache is mixed with while it holds a pruned prompt."""

    prompt: CachedPrompt

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Returns the length of the full prompt and of what followed."""
        length = int(super().get_seq_length(layer_idx))
        return length + self.prompt.of(self._counted(layer_idx)).missing

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Returns how many keys a layer has, and how many tokens of the full prompt
        are missing in front of them.
        """
        length, offset = super().get_mask_sizes(query_length, layer_idx)
        return length, offset + self.prompt.of(self._counted(layer_idx)).missing

    def _counted(self, layer_idx: int) -> int:
        """Returns the layer whose keys transformers counts: for one without
        keys the next that has some.
        """
        later = range(layer_idx, len(self.layers))
        return next((n for n in later if isinstance(self.layers[n], CacheLayerMixin)), layer_idx)

    def update(self, key_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends to a layer, inside a pruning block.

        Args:
            key_states: new keys, (B, G, n, d).
            args: as for transformers' `Cache.update`.
            kwargs: likewise.

        Raises:
            InputError: outside one, where masks and positions would be those of the full prompt.
        """
        self._check_open()
        return cast(tuple[Tensor, Tensor], super().update(key_states, *args, **kwargs))

    def get_conv_state(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what a layer of linear attention remembers of the last
        tokens; raises as `update` does.
        """
        self._check_open()
        return super().get_conv_state(*args, **kwargs)

    def _check_open(self) -> None:
        if not self.prompt.open:
            raise InputError(
                "this cache holds a pruned prompt; go on with it inside a pruning block of its "
                "model, or start an empty cache"
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens; a positive number is the length that stays, as it once was."""
        length = self.prompt.length
        # in columns of the full prompt; each layer loses those of them that it holds
        left = length + tokens_to_remove if tokens_to_remove <= 0 else tokens_to_remove
        left = min(left, length)
        cropped = {first: tokens.crop(left) for first, tokens in self.prompt.layers.items()}
        self.prompt.layers = {first: tokens for first, (tokens, _) in cropped.items()}
        for number, layer in enumerate(self.layers):
            depth = max(first for first in cropped if first <= number)
            # layers beyond the decoder's hold the full length
            extra = number >= self.prompt.depth
            layer.crop(left - length if extra else -cropped[depth][1])
        self.prompt.length = left

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorders rows, as beam search does."""
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row of the layers and of the prompt, `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self.prompt.select(torch.arange(self.prompt.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows at `indices`, of the layers and of the prompt."""
        super().batch_select_indices(indices)
        self._select(indices)

    def reset(self) -> None:
        """Empties the cache, and forgets the prompt."""
        super().reset()
        # PrunedX, PrunedCache, X: back to the cache's own class
        self.__class__ = type(self).__mro__[2]
        del self.prompt

    def _select(self, indices: Tensor) -> None:
        self.prompt.select(torch.as_tensor(indices).cpu())


_KINDS: dict[Any, Any] = {}
"""Classes of caches, mixed with `PrunedCache`."""


def prompt_in(cache: Any) -> CachedPrompt | None:
    """Returns the pruned prompt that a cache holds; None where it holds none."""
    return cache.prompt if isinstance(cache, PrunedCache) else None


def hold(cache: Cache, prompt: CachedPrompt) -> None:
    """Turns a cache, in place, into one that says what it holds of a pruned prompt."""
    if not isinstance(cache, PrunedCache):
        # the object stays the one that `generate` holds; its new class counts the full prompt
        kind = type(cache)
        if kind not in _KINDS:
            _KINDS[kind] = type(f"Pruned{kind.__name__}", (PrunedCache, kind), {})
        cache.__class__ = _KINDS[kind]
    cache.prompt = prompt
