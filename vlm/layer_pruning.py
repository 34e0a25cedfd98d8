"""Dropping image tokens at the input of the language model and between its layers.

Layers before a cut keep all keys and values, layers after it only the kept ones, so cache lengths
differ between layers; masks and positions are made anew for each segment of layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from inspect import signature
from typing import Any, ClassVar, Literal, Protocol, Self

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad
from transformers.masking_utils import (
    LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING,
    blockwise_overlay,
    create_causal_mask,
    sliding_window_overlay,
)

from vlm_prune.kernels.compact_tokens import compact_tokens
from vlm_prune.vlm.attention import (
    SPARSE,
    decoder_keys,
    decoder_query_key,
    expanded_mask,
    mask_kind,
    scored_layers,
    window_of,
)
from vlm_prune.vlm.cache import CACHE, CachedPrompt, CachedTokens, cache_of
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.layout import TokenLayout, alike
from vlm_prune.vlm.prompt_pruning import Positions, on_host
from vlm_prune.vlm.tokens import AttentionRows, DecoderTokens, Kept, compact, take
from vlm_prune.vlm.trace import SELECTION, Trace, phase_timer

Side = Literal["before", "after"]
NO_BIAS = (
    "this method adds to attention, which only sdpa and eager attention allow; "
    "load the model with --attn sdpa"
)


@dataclass(frozen=True)
class Cut:
    """After `layer` decoder layers have run, keep `keep` tokens of each image."""

    layer: int
    keep: int


class Reducer(Protocol):
    """What the engine asks of a method.

    `reads` names the layer whose attention and keys the method sees, on either side of the cut; a
    cut at 0 has only the layer after it. `chooses_queries` says whether to ask for `query_mask`.
    """

    reads: ClassVar[Side]
    chooses_queries: ClassVar[bool]

    def query_mask(self, tokens: DecoderTokens) -> Tensor:
        """Returns the query mask (M, T): which tokens' attention is read,
        given the first layer's input.
        """

    def reduce(self, tokens: DecoderTokens, keep: int) -> Kept:
        """Keeps `keep` tokens of each image."""


@dataclass(frozen=True)
class InsideModel:
    """A method inside the language model.

    Args:
        cuts: those of an image or video, by its number of tokens before any pruning and that of its
            frames, 0 for images.
        reducer: chooses what a cut keeps.
        positions: what positions of kept tokens become.
    """

    cuts: Callable[..., list[Cut]]
    reducer: Reducer
    positions: Positions


class PerToken(Protocol):
    """An argument of decoder layers that holds something for every token so far."""

    def select_tokens(self, columns: Tensor, valid: Tensor, positions: Tensor) -> Self:
        """Returns the part that layers after a cut get: tokens `columns`, all shapes (B, L').

        Args:
            columns: of the full input that are kept.
            valid: which of them are no padding.
            positions: of the kept tokens.
        """


@dataclass
class Segment:
    """What the layers from one cut to the next get.

    Args:
        layout: this forward's tokens.
        cached: those, and what these layers' cache holds of tokens before them.
        front: columns that the cache says stood in front of what it holds.
        positions: position ids of this forward's tokens.
        entered: their indices in what the decoder was given, (B, n).
        rotary: tables of their positions by kind of layer, as far as they are known; None where
            they are the decoder's own.
        selected: arguments for every token so far.
        masks: attention masks, by kind of layer.
        biased: the masks of layers that count tokens by their sizes, likewise, those of the first
            layer apart.
    """

    layout: TokenLayout
    cached: CachedTokens
    front: int
    positions: Tensor
    entered: Tensor
    rotary: dict[str, tuple[Tensor, Tensor]] | None = None
    selected: dict[str, Any] = field(default_factory=dict)
    masks: dict[str, Any] = field(default_factory=dict)
    biased: dict[tuple[str, bool], Tensor] = field(default_factory=dict)

    def mask(self, device: torch.device, explicit: bool = False) -> Tensor | None:
        """Returns the attention mask (B, K) of these layers' keys, None where none is padding."""
        if not explicit and bool(self.cached.valid.all()):
            return None
        # columns that the cache counts but does not hold are masked
        front = self.cached.valid.new_zeros(len(self.cached.valid), self.front)
        return torch.cat([front, self.cached.valid], 1).to(device)

    def blocks(self, blocks: Tensor, device: torch.device) -> Tensor:
        """Returns the block of each of these layers' keys, (B, K), -1 for text,
        given those of the full input.
        """
        # blocks of this forward's tokens, behind those of the cache, which are none
        current = torch.where(self.layout.valid, blocks.gather(1, self.layout.column), -1)
        past = self.front + self.cached.valid.shape[1] - current.shape[1]
        return torch.cat([current.new_full((len(current), past), -1), current], 1).to(device)


@dataclass
class Forward:
    """One forward through a model inside a pruning block.

    Args:
        layout: the full input's tokens.
        past: tokens of the full prompt that stood before them.
        prompt: what the cache holds of those.
        right_padded: whether kept tokens of ragged rows move to the left.
        available: tokens of each image before any pruning.
        seeds: one number per image for methods that draw random ones.
        kept: what a method before the model keeps of the images.
        due: for each layer that cuts how many tokens each image keeps.
        positions: position ids of the full input, (B, L) or (3 or 4, B, L).
        seen: how many tokens each row has so far, padding apart, (B, 1).
        active: the segment of each layer; that of the decoder's input under -1.
        states: a layer with its input and rotation, for the cut after it, and the keys that it held
            before.
        query_mask: the question's tokens that the method reads, of each image.
        deepstack: features that layers add to the full input, by layer.
        per_token: arguments of layers for every token so far, of the full input.
        cuts: indices kept of each image at each cut.
        blocks: which tokens of the full input attend to each other both ways: those of the same
            number, (B, L), -1 for none; None where all attention is causal.
        wanted: of how many of the last tokens the decoder is to give the output; 0 for all.
    """

    layout: TokenLayout
    past: int
    prompt: CachedPrompt
    right_padded: bool
    available: list[int]
    seeds: list[int] = field(default_factory=list)
    kept: Kept | None = None
    due: dict[int, dict[int, int]] = field(default_factory=dict)
    positions: Tensor = field(default_factory=lambda: torch.zeros(0))
    seen: Tensor = field(default_factory=lambda: torch.zeros(0))
    active: dict[int, Segment] = field(default_factory=dict)
    states: dict[int, tuple[Any, Tensor, tuple[Tensor, Tensor], Tensor | None]] = field(
        default_factory=dict
    )
    query_mask: Tensor | None = None
    deepstack: dict[int, Tensor] = field(default_factory=dict)
    per_token: dict[str, PerToken] = field(default_factory=dict)
    cuts: dict[int, list[Tensor]] = field(default_factory=dict)
    blocks: Tensor | None = None
    wanted: int = 0


def cut_depths(decoder: Any, reads: Side, last: int) -> list[int]:
    """Returns how many decoder layers can have run at a cut, where the layer that the method reads
    has attention to be read.

    Args:
        decoder: the language model.
        reads: on which side of the cut that layer is.
        last: how many layers can have run at most.
    """
    scored = scored_layers(decoder.config, len(decoder.layers))
    # behind layer n, n + 1 layers have run
    depths = [number + (reads == "before") for number in scored]
    # a cut at the decoder's input has only the layer after it
    depths = [0, *depths] if reads == "before" and scored[:1] == [0] else depths
    return [depth for depth in depths if depth <= last]


@cache
def takes_layer_type(forward: Callable[..., Any]) -> bool:
    """Returns whether rotary embeddings, by their class's forward, ask for the kind of the layer."""
    return "layer_type" in signature(forward).parameters


def position_deltas(forward: Forward) -> Tensor:
    """Returns by how much the next token's position is above the number of tokens, (B, 1), where
    positions have rows and columns.
    """
    positions = forward.positions if forward.positions.ndim == 3 else forward.positions[None]
    # the last three rows are time, height and width; a fourth in front is that of the text
    padding = ~forward.layout.valid.to(positions.device)
    highest = positions[-3:].masked_fill(padding, -1).amax((0, 2))[:, None]
    return highest + 1 - forward.seen.to(positions.device)


def gathered(
    keep: Tensor, column: Tensor, valid: Tensor, tensors: list[Tensor], right_padded: bool
) -> list[Tensor]:
    """Returns tensors (B, L, d) without the tokens where `keep` is false, padding zero.

    Args:
        keep: which tokens stay, (B, L).
        column: their indices, (B, L'), which say the same.
        valid: which of those are no padding, (B, L').
        tensors: to gather; gradients flow through `column`, while the kernel is faster.
        right_padded: whether padding stands on the right.
    """
    device = tensors[0].device
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        # a differentiable gather, padding zero
        column, mask = column.to(device), valid.to(device)[..., None]
        return [take(tensor, column) * mask for tensor in tensors]
    _, moved = compact_tokens(keep.to(device), *tensors, right_padded=right_padded)
    return moved


@dataclass(frozen=True)
class LayerPruning:
    """Cuts in one decoder.

    Args:
        decoder: the language model.
        inside: the method that cuts between layers, if there is one.
        renumbers: whether the cut at the decoder's input renumbers positions without gaps.
        contiguous: whether cuts between layers do.
        trace: gets the seconds that choosing took.
        both_ways: kinds of layers in which an image's tokens attend to each other both ways.
    """

    decoder: Any
    inside: InsideModel | None
    renumbers: bool
    contiguous: bool
    trace: Trace
    both_ways: tuple[str, ...] = ()

    def before_decoder(self, forward: Forward, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Returns the decoder's arguments after the cut at its input, if there is one."""
        hidden_states, layout = kwargs["inputs_embeds"], forward.layout
        positions = kwargs.get("position_ids")
        if positions is None:
            first = forward.past
            # the decoder would number its input so
            positions = torch.arange(
                first, first + hidden_states.shape[1], device=hidden_states.device
            )[None]
        # by hand and with a mask, Qwen gives positions of all tokens so far
        positions = positions[..., -hidden_states.shape[1] :]
        # one row for all of the batch becomes one for each: (B, L) or (3 or 4, B, L)
        forward.positions = positions.expand(*positions.shape[:-2], len(hidden_states), -1)
        forward.per_token = {n: v for n, v in kwargs.items() if hasattr(v, "select_tokens")}
        new: dict[str, Any] = {"position_ids": positions}
        if isinstance(last := kwargs.get("logits_to_keep"), int):
            forward.wanted = last
            # Gemma 4 leaves rows out on its way, of which it would take others behind a cut
            cut = forward.due or len(forward.prompt.layers) > 1
            new["logits_to_keep"] = 0 if cut and last > 1 else last
        if forward.kept is not None:
            keep = keep_mask(layout, forward.kept.indices)
            # drop what is not kept, then write what the method made of the rest in its place
            if not bool((keep == layout.valid).all()):
                layout, column = layout.keep(keep, forward.right_padded, self.renumbers)
                (hidden_states,) = gathered(
                    keep, column, layout.valid, [hidden_states], forward.right_padded
                )
            new["inputs_embeds"] = filled(hidden_states, layout, forward.kept.features)
            if layout is not forward.layout and kwargs.get("per_layer_inputs") is not None:
                # embeddings of ids, (B, L, layers, d), that the decoder hands to its layers
                per_layer = kwargs["per_layer_inputs"]
                chosen = take(per_layer.flatten(2), layout.column.to(per_layer.device))
                new["per_layer_inputs"] = chosen.unflatten(2, per_layer.shape[2:])
            # of tokens that stand for several the layers know how many
            if forward.kept.sizes is not None and layout is not forward.layout:
                layout = layout.sized(forward.kept.sizes)
        segment = self.segment(forward, layout, 0)
        forward.active[-1] = segment
        # masks and positions that the decoder was given are those of the full prompt
        if segment.cached.pruned:
            grown = cache_of(kwargs) is not None or kwargs.get("use_cache")
            new["attention_mask"] = segment.mask(hidden_states.device, explicit=not grown)
            if forward.blocks is not None:
                # one mask for each kind of layer, as the decoder itself makes them
                kinds = [mask_kind(self.decoder.config, n) for n in range(len(self.decoder.layers))]
                new["attention_mask"] = {
                    kind: self._mask(forward, segment, kinds.index(kind), hidden_states, kwargs)
                    for kind in set(kinds)
                }
            new["position_ids"] = segment.positions
            new |= self.selected(forward, segment, hidden_states.device)
        return kwargs | new | self._deepstack(forward, layout, kwargs)

    def _deepstack(
        self, forward: Forward, layout: TokenLayout, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Returns the features that the decoder adds to image tokens;
        those after a cut are added here.

        Args:
            forward: this forward.
            layout: of the decoder's input.
            kwargs: of the decoder, with features of every layer.
        """
        layers = kwargs.get("deepstack_visual_embeds")
        if layers is None:
            return {}
        # up to the first cut between layers the decoder adds them itself, at `at` (B, L)
        first, at = min(forward.due, default=len(layers)), kwargs["visual_pos_masks"]
        new = {"deepstack_visual_embeds": layers[:first]}
        if layout is not forward.layout:
            # where the kept tokens are an image's
            column = layout.column.to(at.device)
            new["visual_pos_masks"] = at.gather(1, column) & layout.valid.to(at.device)
        for number, features in enumerate(layers):
            if number < first and layout is forward.layout:
                continue
            # features of image tokens, spread over the full input, (B, L, D)
            whole = features.new_zeros(*at.shape, features.shape[-1])
            whole[at] = features
            if number < first:
                # those of kept tokens, in the order in which the decoder adds them
                moved = take(whole, layout.column.to(whole.device))
                new["deepstack_visual_embeds"][number] = moved[new["visual_pos_masks"]]
            else:
                forward.deepstack[number] = whole
        return new

    def segment(
        self, forward: Forward, layout: TokenLayout, number: int, entered: Tensor | None = None
    ) -> Segment:
        """Returns what layers from `number` on get: this forward's tokens after those that they
        hold.

        Args:
            forward: the one under way.
            layout: of its tokens.
            number: of the layer.
            entered: the tokens' indices in what the decoder was given; all of them unless given.
        """
        # what the cache of this layer holds, with this forward's tokens behind it
        past, full = forward.prompt.of(number), forward.layout
        # tokens dropped of the cache lower positions, and so do those dropped here
        shift = layout.shift + past.next_shift
        cached = CachedTokens(
            torch.cat([past.valid, layout.valid], 1),
            torch.cat([past.column, layout.column + forward.past], 1),
            torch.cat([past.shift, shift], 1),
            past.next_shift + layout.next_shift,
            past.missing + full.valid.shape[1] - layout.valid.shape[1],
            past.pruned or layout is not full,
            joined_sizes(past, layout),
        )
        positions = forward.positions
        if layout is not full:
            # position ids of the tokens that are left; a fourth row is that of the text
            column = layout.column.to(positions.device)
            positions = positions.gather(-1, column.expand(*positions.shape[:-1], -1))
        if positions.ndim == 2:
            positions = positions - shift.to(positions.device) if bool(shift.any()) else positions
        elif len(positions) == 4:
            # the row of the text only orders tokens: gaps in it would read as packed sequences
            order = (cached.valid.cumsum(1) - 1)[:, -layout.valid.shape[1] :]
            positions = torch.cat([order[None].to(positions.device), positions[1:]])
        if not bool(layout.valid.all()):
            positions = positions * layout.valid.to(positions.device)
        if entered is None:
            entered = torch.arange(layout.valid.shape[1]).expand_as(layout.valid)
        return Segment(layout, cached, past.missing, positions, entered)

    def selected(self, forward: Forward, segment: Segment, device: torch.device) -> dict[str, Any]:
        """Returns the arguments for every token so far, for the tokens of a segment.

        Args:
            forward: the one under way.
            segment: whose tokens are taken.
            device: of the layer.
        """
        if not forward.per_token:
            return {}
        cached = segment.cached
        given = [tensor.to(device) for tensor in (cached.column, cached.valid, cached.shift)]
        return {name: value.select_tokens(*given) for name, value in forward.per_token.items()}

    def before_layer(
        self,
        forward: Forward,
        number: int,
        layer: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Cuts if a cut is due, and gives the layer its segment's arguments.

        A layer that is run again, as recomputation for gradients does, gets the same ones again.

        Args:
            forward: the one under way.
            number: of the layer.
            layer: the layer.
            args: its input, (B, n, D), and what else it gets of each token that the decoder was
                given.
            kwargs: its other arguments.
        """
        # what the layer before got is what this one gets, unless something happens between them
        hidden_states, *per_token = args
        segment, device = forward.active[number - 1], hidden_states.device
        if (features := forward.deepstack.get(number - 1)) is not None:
            # add this layer's image features to the tokens that are left
            column, valid = segment.layout.column.to(device), segment.layout.valid.to(device)
            hidden_states = hidden_states + take(features.to(device), column) * valid[..., None]
        # choosing, then cutting; or entering layers of whose cache an earlier pass has cut
        if forward.due and (number == 0 or number in forward.due):
            rotary = self._rotary(segment, number, hidden_states, kwargs["position_embeddings"])
            cutting = Cutting(
                self, forward, number, layer, hidden_states, rotary, segment, cache_of(kwargs)
            )
            if number == 0:
                cutting.choose_queries()
            if number in forward.due:
                hidden_states, segment = cutting.cut()
        elif number in forward.prompt.layers and number > 0:
            known = {} if self.contiguous else segment.rotary
            segment = self.segment(forward, segment.layout, number, segment.entered)
            segment.rotary = known
            segment.selected = self.selected(forward, segment, device)
        forward.active[number] = segment
        kwargs = self._arguments(forward, segment, number, hidden_states, kwargs)
        # the next cut may read this layer, whose keys are still those before this forward
        if number + 1 in forward.due:
            past = held_keys(cache_of(kwargs), number)
            forward.states[number + 1] = (layer, hidden_states, kwargs["position_embeddings"], past)
        # what the decoder made of each token of its input, for those that are left
        if hidden_states.shape[1] == segment.entered.shape[1] and segment is not forward.active[-1]:
            entered = segment.entered.to(device)
            per_token = [take(p, entered) if isinstance(p, Tensor) else p for p in per_token]
        return (hidden_states, *per_token), kwargs

    def _arguments(
        self,
        forward: Forward,
        segment: Segment,
        number: int,
        hidden_states: Tensor,
        kwargs: dict[str, Any],
    ) -> dict[str, Any]:
        """Returns a layer's arguments; the decoder makes those of its own input itself.

        Args:
            forward: this forward.
            segment: what the layer gets.
            number: of the layer.
            hidden_states: its input, (B, n, D).
            kwargs: what the decoder gave it.
        """
        if segment is forward.active[-1]:
            moved = {"position_ids": self._given(segment)} if segment.cached.pruned else {}
            return self._biased(forward, segment, number, hidden_states, kwargs | moved)
        # what the decoder made for its input does not fit fewer tokens; it may ask for the last ones
        rotary = self._rotary(segment, number, hidden_states, kwargs["position_embeddings"])
        mask = self._mask(forward, segment, number, hidden_states, kwargs)
        queries = hidden_states.shape[1]
        replaced = {
            "position_ids": self._given(segment),
            "position_embeddings": tuple(table[:, -queries:] for table in rotary),
            "attention_mask": last_rows(mask, queries),
        }
        return self._biased(
            forward, segment, number, hidden_states, kwargs | segment.selected | replaced
        )

    def _mask(
        self,
        forward: Forward,
        segment: Segment,
        number: int,
        hidden_states: Tensor,
        kwargs: dict[str, Any],
    ) -> Any:
        """Returns the attention mask of layer `number`, made once for all layers of its kind.

        Args:
            forward: this forward.
            segment: what the layer gets.
            number: of the layer.
            hidden_states: its input, (B, n, D).
            kwargs: what the decoder gave it.
        """
        config, kind = self.decoder.config, mask_kind(self.decoder.config, number)
        if kind not in segment.masks:
            make, more = LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING[kind], {}
            if forward.blocks is not None and kind in self.both_ways:
                # within the window, what is causal or of the same block
                make = create_causal_mask
                blocks = segment.blocks(forward.blocks, hidden_states.device)
                more["or_mask_function"] = blockwise_overlay(blocks)
                if kind == "sliding_attention":
                    more["and_mask_function"] = sliding_window_overlay(config.sliding_window)
            segment.masks[kind] = make(
                config=config,
                inputs_embeds=hidden_states,
                attention_mask=segment.mask(hidden_states.device),
                layer_idx=number,
                **{CACHE: cache_of(kwargs)},
                **more,
            )
        return segment.masks[kind]

    def _rotary(
        self,
        segment: Segment,
        number: int,
        hidden_states: Tensor,
        given: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Returns cosines and sines for layer `number`.

        Args:
            segment: what the layer gets.
            number: of the layer.
            hidden_states: its input, for dtype and device.
            given: what the decoder would give it, right unless positions are others.
        """
        if segment.rotary is None:
            return given
        kind = self.rotary_kind(number)
        if kind not in segment.rotary:
            more = {"layer_type": kind} if kind else {}
            segment.rotary[kind] = self.decoder.rotary_emb(
                hidden_states, position_ids=segment.positions, **more
            )
        return segment.rotary[kind]

    def rotary_kind(self, number: int) -> str:
        """Returns the kind of layer `number` where each kind turns by
        frequencies of its own, else nothing.
        """
        kind: Callable[..., Any] = type(self.decoder.rotary_emb).forward
        typed = takes_layer_type(kind)
        return mask_kind(self.decoder.config, number) if typed else ""

    def _biased(
        self,
        forward: Forward,
        segment: Segment,
        number: int,
        hidden_states: Tensor,
        kwargs: dict[str, Any],
    ) -> dict[str, Any]:
        """Returns a layer's arguments, with a mask that counts tokens by
        their sizes where they have some.

        Args:
            forward: this forward.
            segment: what the layer gets.
            number: of the layer.
            hidden_states: its input, (B, n, D).
            kwargs: its arguments so far.
        """
        sizes = segment.cached.sizes
        if sizes is None:
            return kwargs
        kind = mask_kind(self.decoder.config, number)
        if kind not in LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING:
            return kwargs
        key = kind, number == 0
        if key not in segment.biased:
            cache, keys = cache_of(kwargs), hidden_states.shape[1]
            if cache is not None:
                keys, _ = cache.get_mask_sizes(keys, number)
            # a key that stands for s tokens counts s-fold: log s is added to its logits
            bias = sizes[int(number > 0)].to(hidden_states.device).log()[:, None]
            if segment.layout.sizes is not None:
                bias = bias + self._distances(forward, segment, *kwargs["position_embeddings"])
            mask = kwargs.get("attention_mask")
            sparse = self.decoder.config._attn_implementation == SPARSE
            if sparse and isinstance(mask, Tensor) and mask.ndim == 2:
                mask = expanded_mask(mask)
            segment.biased[key] = additive(mask, bias[..., -keys:], hidden_states)
        return kwargs | {"attention_mask": last_rows(segment.biased[key], hidden_states.shape[1])}

    def _distances(self, forward: Forward, segment: Segment, cos: Tensor, sin: Tensor) -> Tensor:
        """Returns log(2 - D) of a segment's tokens and all keys, (B, n, K), D the mean cosine of
        the angles between their rotations; zero for answers, keys of earlier passes, and rows
        that lost no token.

        Args:
            forward: the one under way.
            segment: whose tokens they are.
            cos: of the rotation, (B, n, d).
            sin: likewise.
        """
        # rows of cosines and sines, (B, n, 2 d): the mean cosine of the angles is their product
        layout, entered = segment.layout, forward.active[-1].layout
        assert entered.sizes is not None
        rotation = normalize(torch.cat([cos, sin], -1).float(), dim=-1)
        # the diagonal is 1 but for rounding
        decay = (rotation @ rotation.transpose(1, 2)).clamp(max=1)
        applies = layout.prompt_mask & (entered.sizes[1] != 1).any(1, keepdim=True)
        between = (2 - decay).log() * applies.to(decay.device)[..., None]
        # zeros for keys of the cache, which come first
        return pad(between, (segment.cached.valid.shape[1] - between.shape[2], 0))

    def _given(self, segment: Segment) -> Tensor | None:
        """Returns the position ids that layers are given, beside their rotation."""
        flash, positions = "flash" in self.decoder.config._attn_implementation, segment.positions
        if flash or positions.ndim == 3 and len(positions) == 3:
            # flash attention takes gaps between positions for packed sequences
            return None
        return positions if positions.ndim == 2 else positions[0]


@dataclass(frozen=True)
class Cutting:
    """A cut before decoder layer `number`, which would get `hidden_states` (B, n, D).

    Args:
        pruning: the decoder, and the method.
        forward: what this forward was given.
        number: layers that have run.
        layer: the layer after the cut.
        hidden_states: its input without the cut.
        rotary: cosines and sines of the tokens' positions.
        segment: what the layers before the cut got.
        cache: keys and values of tokens before this forward's.
    """

    pruning: LayerPruning
    forward: Forward
    number: int
    layer: Any
    hidden_states: Tensor
    rotary: tuple[Tensor, Tensor]
    segment: Segment
    cache: Any

    @property
    def reducer(self) -> Reducer:
        """Returns the method that acts inside the language model."""
        assert self.pruning.inside is not None
        return self.pruning.inside.reducer

    def tokens(self, images: list[int]) -> DecoderTokens:
        """Returns what the method sees of images with equally many tokens."""
        layout, device = self.segment.layout, self.hidden_states.device

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device)

        source: Any
        source, before, rotary, number = self.layer, self.hidden_states, self.rotary, self.number
        past_keys = held_keys(self.cache, number)
        # the layer in front of the cut, as it was noted when it ran
        if number and self.reducer.reads == "before":
            number -= 1
            source, before, rotary, past_keys = self.forward.states[self.number]
        # the question's tokens of each row, padded to the longest, (B, T)
        index, real = map(moved, compact(layout.question_mask))
        columns_of = layout.images()
        # rows and columns of the images' tokens (M, n) and of their questions (M, T)
        row = moved(layout.rows[images])
        texts, question = index[row], real[row]
        at = (row[:, None], moved(torch.stack([columns_of[image] for image in images])))
        text_at = (row[:, None], texts)

        mixed = torch.is_autocast_enabled(device.type)

        def attention(columns: Tensor, real: Tensor, last: Tensor | None = None) -> AttentionRows:
            with torch.autocast(device.type, enabled=mixed):
                query, key = decoder_query_key(source, before, rotary, columns)
            valid, first = layout.valid, 0
            if self.forward.prompt.of(number).valid.shape[1]:
                # keys of the cache come first, and shift the columns of this forward
                past, past_valid = self.past_keys(number, past_keys)
                key, first = torch.cat([past.to(key), key], 2), past.shape[2]
                valid = torch.cat([past_valid, valid], 1)
            # a token sees all keys up to the last one of its block
            until = torch.where(real, columns if last is None else last, -1)
            return AttentionRows(
                query[row],
                key[row],
                torch.where(real, until + first, -1)[row],
                moved(valid)[row],
                at[1] + first,
                source.self_attn.scaling,
                window_of(self.pruning.decoder.config, number),
            )

        def question_rows(queries: slice) -> AttentionRows:
            return attention(index[:, queries], real[:, queries])

        def prompt_rows() -> AttentionRows:
            # every token of the prompt is a query
            columns = torch.arange(layout.valid.shape[1], device=device).expand(len(before), -1)
            last = self.last_of_block(columns, number)
            return attention(columns, moved(layout.prompt_mask), last)

        def keys() -> tuple[Tensor, Tensor]:
            with torch.autocast(device.type, enabled=mixed):
                unturned = decoder_keys(source, before)
            return unturned[at], unturned[text_at]

        # unless the method has chosen among the question's tokens, it reads all of them
        mask = question if self.forward.query_mask is None else self.forward.query_mask[images]
        return DecoderTokens(
            self.hidden_states[at],
            self.hidden_states[text_at],
            question,
            mask,
            question_rows,
            prompt_rows,
            keys,
            self.pruning.decoder.norm,
            tuple(self.forward.seeds[image] for image in images),
        )

    def last_of_block(self, columns: Tensor, number: int) -> Tensor | None:
        """Returns where the last token stands that each token sees in layer `number`, (B, n).

        None where that is the token itself.
        """
        kind = mask_kind(self.pruning.decoder.config, number)
        if self.forward.blocks is None or kind not in self.pruning.both_ways:
            return None
        layout = self.segment.layout
        # the block of each token that is left
        blocks = torch.where(layout.valid, self.forward.blocks.gather(1, layout.column), -1)
        blocks = blocks.to(columns.device)
        # -1 as an index is the last entry, which stands for text
        ends = columns.new_full((len(columns), int(blocks.max()) + 2), -1)
        ends.scatter_reduce_(1, blocks % ends.shape[1], columns, "amax")
        return torch.where(blocks < 0, columns, ends.gather(1, blocks % ends.shape[1]))

    def past_keys(self, number: int, keys: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns keys (B, G, P, d) of tokens before this forward's, and which are valid.

        Args:
            number: of the layer.
            keys: that the cache held of it before this forward.

        Raises:
            InputError: when these are not all of them.
        """
        valid = self.forward.prompt.of(number).valid
        offloaded = getattr(self.cache, "offloading", False)
        lost = keys is None or (keys.shape[2] < valid.shape[1] and not self.sliding(number))
        if keys is None or lost or offloaded:
            raise InputError(
                "images behind a prefix need its keys; give the whole prompt at once, or a cache "
                "that is neither quantized nor offloaded"
            )
        # a sliding window has forgotten the first ones
        return keys, valid[:, valid.shape[1] - keys.shape[2] :]

    def sliding(self, number: int) -> bool:
        """Returns whether layer `number` forgets keys that its window has passed."""
        return mask_kind(self.pruning.decoder.config, number) == "sliding_attention"

    def choose_queries(self) -> None:
        """Notes which tokens' attention the method reads, from the first layer's input."""
        if not self.reducer.chooses_queries:
            return
        layout, device = self.segment.layout, self.hidden_states.device
        with phase_timer(SELECTION, device, self.pruning.trace):
            # (M, T) of all images, filled for those of each number of tokens
            shape = len(layout.counts), compact(layout.question_mask)[0].shape[1]
            self.forward.query_mask = torch.zeros(shape, dtype=torch.bool, device=device)
            for group in alike(layout.counts):
                if layout.counts[group[0]]:
                    tokens = self.tokens(group)
                    with torch.autocast(device.type, enabled=False):
                        chosen = self.reducer.query_mask(tokens)
                    self.forward.query_mask[group] = chosen

    def cut(self) -> tuple[Tensor, Segment]:
        """Returns hidden states (B, n, D) of what is kept, and what
        the layers after the cut get.
        """
        forward, layout, device = self.forward, self.segment.layout, self.hidden_states.device
        due = forward.due[self.number]
        # how many tokens each image keeps; nothing is moved where all stay
        wanted = [min(count, due.get(i, count)) for i, count in enumerate(layout.counts)]
        if wanted == layout.counts:
            forward.cuts[self.number] = layout.indices()
            return self.hidden_states, self.segment
        columns = layout.images()
        # all text stays, and what the method chooses of each image
        keep = layout.valid & (layout.image < 0)
        features: list[Tensor | None] = [None] * len(columns)
        with phase_timer(SELECTION, device, self.pruning.trace):
            for group in alike(list(zip(layout.counts, wanted, strict=True))):
                count, left = layout.counts[group[0]], wanted[group[0]]
                indices = [torch.arange(count)] * len(group)
                if left < count:
                    tokens = self.tokens(group)
                    # methods choose in the precision that they say themselves
                    with torch.autocast(device.type, enabled=False):
                        reduced = self.reducer.reduce(tokens, left)
                    indices = on_host(reduced.indices)
                    for image, rows in zip(group, reduced.features, strict=True):
                        features[image] = rows
                for image, chosen in zip(group, indices, strict=True):
                    keep[layout.rows[image], columns[image][chosen]] = True
            keep = layout.without_empty_rows(keep)
            # close the gaps; unless positions are renumbered, rotations move with their tokens
            kept, column = layout.keep(keep, forward.right_padded, self.pruning.contiguous)
            tables = []
            if not self.pruning.contiguous:
                tables = [table.expand(len(self.hidden_states), -1, -1) for table in self.rotary]
            hidden_states, *rotary = gathered(
                keep, column, kept.valid, [self.hidden_states, *tables], forward.right_padded
            )
            hidden_states = filled(hidden_states, kept, features)
        # indices in the decoder's input, of what an earlier cut may already have thinned
        entered = self.segment.entered.gather(1, column)
        segment = self.pruning.segment(forward, kept, self.number, entered)
        segment.rotary = {}
        if rotary:
            cos, sin = rotary
            segment.rotary[self.pruning.rotary_kind(self.number)] = cos, sin
        segment.selected = self.pruning.selected(forward, segment, device)
        forward.cuts[self.number] = kept.indices()
        return hidden_states, segment


def held_keys(cache: Any, number: int) -> Tensor | None:
    """Returns the keys (B, G, P, d) that a cache holds of layer `number`; None where it holds none, or
    others than attention gets.
    """
    layers = [] if cache is None else cache.layers
    keys: Tensor | None = getattr(layers[number], "keys", None) if number < len(layers) else None
    return keys if keys is not None and keys.ndim == 4 else None


def joined_sizes(past: CachedTokens, layout: TokenLayout) -> Tensor | None:
    """Returns sizes of tokens in the cache and of those that follow,
    (2, B, K); None where all are 1.
    """
    if past.sizes is None and layout.sizes is None:
        return None
    parts = [
        torch.ones(2, *part.valid.shape) if part.sizes is None else part.sizes
        for part in (past, layout)
    ]
    return torch.cat(parts, 2)


def additive(mask: Tensor | None, bias: Tensor, hidden_states: Tensor) -> Tensor:
    """Returns a bias as a mask (B, 1, n, K) that hides what `mask` hides.

    Args:
        mask: (B, 1, n, K), boolean or additive; None hides what is behind a query.
        bias: of each key, or of each query and key, (B, 1 or n, K).
        hidden_states: states of the queries, (B, n, D).

    Raises:
        InputError: when the model's attention takes no such mask.
    """
    queries, keys = hidden_states.shape[1], bias.shape[-1]
    if mask is None:
        # the last query sees all keys, the one before it all but one
        seen = torch.ones(queries, keys, dtype=torch.bool, device=hidden_states.device)
        mask = seen.tril(keys - queries)
    elif not isinstance(mask, Tensor) or mask.ndim != 4:
        raise InputError(NO_BIAS)
    mask, bias = mask.to(hidden_states.device), bias[:, None].to(hidden_states.dtype)
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(hidden_states.dtype).min)
    return mask + bias


def last_rows(mask: Any, count: int) -> Any:
    """Returns a mask of attention for the last `count` queries, of a mask (B, 1, n, K) or another
    kind, which stays as it is.
    """
    whole = not isinstance(mask, Tensor) or mask.ndim != 4
    return mask if whole else mask[:, :, -count:]


def keep_mask(layout: TokenLayout, indices: list[Tensor]) -> Tensor:
    """Returns which tokens stay, a mask (B, n): text, and of each image the
    placeholders at `indices` (k,), ascending.

    Ends of rows that are left empty go.
    """
    keep = layout.valid & (layout.image < 0)
    for row, columns, chosen in zip(layout.rows, layout.images(), indices, strict=True):
        # masked placeholders have no columns
        keep[row, columns[torch.searchsorted(layout.index[row, columns], chosen)]] = True
    return layout.without_empty_rows(keep)


def filled(hidden_states: Tensor, layout: TokenLayout, features: Sequence[Tensor | None]) -> Tensor:
    """Returns hidden states with each image's tokens replaced, (B, n, D).

    Args:
        hidden_states: (B, n, D).
        layout: where the images' tokens stand.
        features: of each image, (k, D), or None.
    """
    columns = layout.images()
    given = [
        image for image, rows in enumerate(features) if rows is not None and len(columns[image])
    ]
    if not given:
        return hidden_states
    # row and column of every token that is replaced, in the order of their values
    row = torch.cat([layout.rows[image].expand(len(columns[image])) for image in given])
    column = torch.cat([columns[image] for image in given])
    values = torch.cat([rows for image in given if (rows := features[image]) is not None])
    at = (row.to(hidden_states.device), column.to(hidden_states.device))
    return hidden_states.index_put(at, values.to(hidden_states.device, hidden_states.dtype))
