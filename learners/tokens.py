"""The tokens at the input of the language model: what the learners attend to."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from vlm_prune.learners.config import Modality, WingsConfig
from vlm_prune.learners.rotary import Rotary, Tables, rotation_matrix
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.renamed import renamed_names
from vlm_prune.vlm.tokens import compact, take

EXTRA_ROWS = 256
__getattr__ = renamed_names(__name__, {"Tokens": "PromptTokens"})


def _locked(tensor: Tensor) -> bool:
    """Returns whether a tensor was made in inference mode and must not be written to outside it."""
    return tensor.is_inference() and not torch.is_inference_mode_enabled()


class GrowingTensor:
    """A tensor (..., N, d) that grows along N, in a buffer of more rows so that few steps copy it."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None
        self._length = 0

    @property
    def tensor_so_far(self) -> Tensor:
        """Returns all that was appended, (..., N, d), as a view."""
        assert self._buffer is not None
        return self._buffer[..., : self._length, :]

    def __len__(self) -> int:
        return self._length

    def append(self, new: Tensor) -> Tensor:
        """Appends (..., n, d) and returns `tensor_so_far`."""
        # rows from `start` on are the new ones
        start, self._length = self._length, self._length + new.shape[-2]
        rows = self._buffer
        if rows is None or rows.shape[-2] < self._length or _locked(rows):
            # a larger buffer takes over the rows so far
            shape = *new.shape[:-2], self._length + EXTRA_ROWS, new.shape[-1]
            rows = new.new_empty(shape)
            if self._buffer is not None:
                rows[..., :start, :] = self._buffer[..., :start, :]
            self._buffer = rows
        rows[..., start : self._length, :] = new
        return self.tensor_so_far


@dataclass
class LearnerCache:
    """What is kept of the tokens at `index` (B, M), and grows with them when decoding.

    `features` (B, H, M, head_dim), and what each learner computes of them: keys of that shape, and
    (B, M, rank) for its values.
    """

    index: Tensor
    features: GrowingTensor = field(default_factory=GrowingTensor)
    by_learner: dict[nn.Module, tuple[GrowingTensor, GrowingTensor]] = field(default_factory=dict)

    def of(self, learner: nn.Module) -> tuple[GrowingTensor, GrowingTensor]:
        """Returns what a learner has computed so far, to be appended to."""
        return self.by_learner.setdefault(learner, (GrowingTensor(), GrowingTensor()))


class QueryRun(NamedTuple):
    """Neighboring queries `start` to `stop`, which see `before` keys, and each other if `includes_itself`."""

    start: int
    stop: int
    before: int
    includes_itself: bool


class Keys(NamedTuple):
    """One modality's M tokens, for S queries; the last n of them are new, the first ones in `cache`.

    Shapes: new (B, n, D), features of all (B, H, M, head_dim), rotary cos and sin of the new ones
    (B, n, head_dim) or of a single one its matrix, visible (B, S, M). `runs` says the same as
    `visible` where that is alike in all rows.
    """

    new: Tensor
    features: Tensor
    rotary: Rotary
    visible: Tensor
    runs: tuple[QueryRun, ...] | None = None
    cache: LearnerCache | None = None


def keys_of(is_image: Tensor, valid: Tensor, config: WingsConfig) -> dict[Modality, Tensor]:
    """Returns which tokens each learner attends to, (B, N) each.

    Args:
        is_image: which tokens are an image's, (B, N).
        valid: which are no padding, (B, N).
        config: the learners.
    """
    image, text = is_image & valid, ~is_image & valid
    if config.images == "first":
        # tokens of the first unbroken run: no second run has begun
        before = torch.nn.functional.pad(image[:, :-1], (1, 0))
        image = image & ((image & ~before).cumsum(1) == 1)
    if config.skip_text:
        # the first text tokens of rows with an image
        skipped = is_image.any(1, keepdim=True) & (text.cumsum(1) <= config.skip_text)
        text = text & ~skipped
    return {"visual": image, "textual": text}


@dataclass
class PromptTokens:
    """All tokens so far, of which the last `queries` are new; tensors (B, N) and `features` (B, N, D).

    `rotary(features, positions)` gives the decoder's cos and sin tables; `keys` holds what each
    learner attends to, the same for all layers. `visible_to` (B, N, N) is what the main attention sees
    where that is not simply what comes before: rows packed from several questions. `caches` are what
    learners computed of earlier tokens, kept with the model's cache. `ranks` (B, N) is each token's place among
    the valid ones of its sequence, and `unpadded` says that it is the column, where looking is free.
    """

    features: Tensor
    is_image: Tensor
    valid: Tensor
    positions: Tensor
    queries: int
    rotary: Callable[[Tensor, Tensor], Tables]
    config: WingsConfig
    visible_to: Tensor | None = None
    caches: dict[Modality, LearnerCache] | None = None
    keys: dict[Modality, Keys] = field(init=False)
    ranks: Tensor = field(init=False)
    unpadded: bool = field(init=False)
    _turn: tuple[Tables, Tensor] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        # looking makes a GPU wait
        alone = self.valid.device.type == "cpu" and self.visible_to is None
        self.unpadded = alone and bool(self.valid.all())
        # padding does not shift a token's place in its row; packed rows say it by position
        ranks = (self.valid.cumsum(1) - 1).clamp(min=0)
        self.ranks = ranks if self.visible_to is None else self.positions
        # at once, not on demand: a checkpointed layer must not do more work than its recomputation
        self.keys = {
            modality: self._gather(modality, chosen)
            for modality, chosen in keys_of(self.is_image, self.valid, self.config).items()
            if modality in self.config.modalities
        }

    def turn(self, rotary: Tables) -> Rotary:
        """Returns the rotation of the queries: of a single one its matrix, made once for all layers."""
        if self.queries > 1:
            return rotary
        if self._turn is None or self._turn[0] is not rotary:
            self._turn = rotary, rotation_matrix(*rotary)
        return self._turn[1]

    def _gather(self, modality: Modality, chosen: Tensor) -> Keys:
        causal = modality == "textual" or self.config.visual_mask == "causal"
        index, present = compact(chosen)
        if not index.shape[1]:
            # a hidden key keeps every weight in the graph, as data-parallel training wants it
            index, present = index.new_zeros(len(index), 1), present.new_zeros(len(index), 1)
        # (B, M) -> (B, S, M): every query sees what is no padding
        visible = present[:, None].expand(-1, self.queries, -1)
        if causal and self.visible_to is not None:
            visible = visible & self.visible_to.gather(2, index[:, None].expand_as(visible))
        elif causal:
            length = self.features.shape[1]
            # the queries are the last tokens: each sees the modality's tokens up to itself
            query = torch.arange(length - self.queries, length, device=index.device)
            visible = visible & (index[:, None] <= query[:, None])
        cache = None if self.caches is None else self.caches.get(modality)
        cached = 0 if cache is None else cache.index.shape[1]
        if self.caches is not None:
            # a cache serves only if its tokens are the first ones of these
            if cache is None or not torch.equal(cache.index, index[:, :cached]):
                cache, cached = LearnerCache(index), 0
            cache.index, self.caches[modality] = index, cache
        # only tokens that are not cached yet are gathered and rotated
        new_index = index[:, cached:]
        new = take(self.features, new_index)
        tables = self.rotary(new, self.positions.gather(1, new_index))
        rotary = rotation_matrix(*tables) if new.shape[1] == 1 else tables
        # (B, n, D) -> (B, H, n, head_dim)
        features = new.unflatten(-1, (-1, tables[0].shape[-1])).transpose(1, 2)
        if cache is not None:
            features = cache.features.append(features)
        return Keys(new, features, rotary, visible, self._runs(chosen) if causal else None, cache)

    def _runs(self, chosen: Tensor) -> tuple[QueryRun, ...] | None:
        """Returns runs of queries when all rows are alike and without padding, on a CPU."""
        if not self.unpadded or (len(chosen) > 1 and (chosen != chosen[:1]).any()):
            return None
        # runs of queries of one modality, with the number of its keys before each
        first = chosen.shape[1] - self.queries
        if self.queries == 1:
            return (QueryRun(0, 1, int(chosen[0, :-1].sum()), bool(chosen[0, -1])),)
        is_chosen, counts = chosen[0].tolist(), [0, *chosen[0].cumsum(0).tolist()]
        cuts = [n for n in range(first + 1, len(is_chosen)) if is_chosen[n] != is_chosen[n - 1]]
        edges = [first, *cuts, len(is_chosen)]
        return tuple(
            QueryRun(a - first, b - first, counts[a], is_chosen[a])
            for a, b in pairwise(edges)
            if a < b
        )

    def select_tokens(self, columns: Tensor, valid: Tensor, shift: Tensor) -> "PromptTokens":
        """Returns the tokens that layers after a cut see.

        Args:
            columns: token indices among these N, (B, L).
            valid: which of them are no padding, (B, L).
            shift: by how much lower their positions are, (B, L).

        Raises:
            InputError: for packed rows.
        """
        if self.visible_to is not None:
            raise InputError("packed rows cannot be pruned in the stack; give a 2D attention mask")
        return PromptTokens(
            take(self.features, columns),
            self.is_image.gather(1, columns),
            valid,
            (self.positions.gather(1, columns) - shift) * valid,
            min(self.queries, columns.shape[1]),
            self.rotary,
            self.config,
        )


class _Stored(DynamicLayer):  # type: ignore[misc]
    """An extra layer of a model's cache: features (B, 1, N, D), and image flag, validity, position.

    As a cache layer it follows beam search, cropping and batch selection; each of these drops what
    the learners cache, since rows or tokens are others then.
    """

    keys: Any
    values: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.caches: dict[Modality, LearnerCache] = {}
        self._rows = GrowingTensor()
        self._last: Tensor | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        before: Tensor | None = self.keys if self.is_initialized else None
        found: tuple[Tensor, Tensor]
        if torch.is_grad_enabled() or before is None:
            found = super().update(key_states, value_states, *args, **kwargs)
            return found
        if before is not self._last:  # rows were dropped or moved since
            self._rows = GrowingTensor()
            self._rows.append(before)
        self._last = self._rows.append(key_states)
        found = self._last, torch.cat([self.values, value_states], -2)
        self.keys, self.values = found
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Stored":
        other = copy.copy(self)
        other.__dict__.update(copy.deepcopy(vars(self) | {"caches": {}}, memo))
        return other

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.caches.clear()
        super().reorder_cache(beam_idx)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        self.caches.clear()
        super().crop(*args, **kwargs)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.caches.clear()
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.caches.clear()
        super().batch_select_indices(indices)

    def reset(self) -> None:
        self.caches.clear()
        super().reset()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.values = value_states.new_empty(0)


def remember(
    cache: Any, depth: int, features: Tensor, facts: Tensor
) -> tuple[Tensor, Tensor, dict[Modality, LearnerCache] | None]:
    """Appends new tokens' features (B, S, D) and facts (B, S, 3) to a cache; returns all so far.

    With them comes what the learners computed of earlier tokens, where no gradient needs it anew.

    Args:
        cache: the model's cache.
        depth: decoder layers, which come before the layer that is added here.
        features: new tokens' input features, (B, S, D).
        facts: for each of them its image flag, validity and position, (B, S, 3).

    Raises:
        InputError: when the cache was filled without the learners.
    """
    stored = next((layer for layer in cache.layers if isinstance(layer, _Stored)), None)
    if stored is None:
        if cache.get_seq_length():
            raise InputError("this cache was filled before Wings was attached; start an empty one")
        # caches make layers on demand: ours comes behind all of the decoder's
        while len(cache.layers) < depth:
            cache.layers.append(cache.layer_class_to_replicate())
        stored = _Stored()
        cache.layers.append(stored)
    keys, values = stored.update(features[:, None], facts[:, None])
    return keys[:, 0], values[:, 0], None if torch.is_grad_enabled() else stored.caches
