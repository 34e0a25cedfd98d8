"""The in-LLM route: drop image tokens between decoder layers of an unmodified model.

Layers before a cut keep all keys and values, layers after it only the kept ones, so cache lengths
differ between layers; masks and positions are rebuilt for each segment.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlm_prune.vlm.attention import decoder_keys, decoder_query_key
from vlm_prune.vlm.cache import cache_of
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.families import family_of
from vlm_prune.vlm.layout import Standing, alike, repeated
from vlm_prune.vlm.prompt_pruning import Positions, keeps_positions, on_host
from vlm_prune.vlm.reducer import CutsFor, Reducer
from vlm_prune.vlm.segment import Segment
from vlm_prune.vlm.tokens import AttentionRows, DecoderTokens, compact, is_right_padded, take
from vlm_prune.vlm.trace import SELECTION, Trace, measured


class _MidStack:
    """Hooks that cut, and what they know of the prompt."""

    def __init__(
        self,
        model: Any,
        cuts: CutsFor,
        reducer: Reducer,
        positions: Positions,
        trace: Trace | None,
    ) -> None:
        self.family = family_of(model)
        self.cuts_for, self.reducer = cuts, reducer
        self.contiguous = not keeps_positions(self.family, positions)
        self.trace = trace or Trace()
        self.due: dict[int, dict[int, int]] = {}
        self.deepstack: list[Tensor] = []
        self.segments: dict[int, Segment] = {}
        self.prefill = False
        self.seen = 0

    def before_model(self, _: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Note what the prompt looks like, and whether this is a prefill."""
        ids = args[0] if args else kwargs.get("input_ids")
        past = cache_of(kwargs)
        if ids is None:
            raise InputError("pruning inside the language model needs input_ids, not inputs_embeds")
        mask = kwargs.get("attention_mask")
        self.prefill = past is None or past.get_seq_length() == 0
        if not self.prefill:
            self.incoming = (
                torch.ones(ids.shape, dtype=torch.bool)
                if mask is None
                else mask[:, -ids.shape[1] :].bool().cpu()
            )
            if kwargs.get("position_ids") is None and not self.family.mrope:
                step = torch.arange(ids.shape[1], device=ids.device)
                ends = self.seen + step if mask is None else (mask.cumsum(1) - 1)[:, -len(step) :]
                kwargs["position_ids"] = ends.expand(len(ids), -1)
            self.steps = None if self.family.mrope else kwargs["position_ids"].cpu()
            self.seen += ids.shape[1]
            return args, kwargs
        self.seen = ids.shape[1]
        valid = torch.ones(ids.shape, dtype=torch.bool) if mask is None else mask.bool().cpu()
        self.right_padded = is_right_padded(valid)
        is_image = ids.cpu() == self.family.image_token
        if self.trace.entered:
            order = repeated([len(places) for places in self.trace.entered], is_image)
            available = [self.trace.available[image] for image in order]
            self.trace.kept = [self.trace.entered[image] for image in order]
        else:
            available = self.family.counts(ids, kwargs)
            self.trace.kept = [torch.arange(count) for count in available]
            self.trace.available = available
        self.now = Standing.of(is_image, valid, self.trace.kept)
        self.segments, self.trace.cuts, self.due, self.deepstack = {}, [], {}, []
        for image, count in enumerate(available):
            for cut in self.cuts_for(count):
                self.due.setdefault(cut.layer, {})[image] = cut.keep
        self.trace.computed = [self.now.left] * len(self.family.decoder.layers)
        return args, kwargs

    def before_decoder(self, _: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Take features that the decoder would add to image tokens at places of the full prompt."""
        layers = kwargs.get("deepstack_visual_embeds")
        if self.prefill and self.due and layers is not None:
            at = kwargs["visual_pos_masks"]
            for features in layers:
                whole = features.new_zeros(*at.shape, features.shape[-1])
                whole[at] = features
                self.deepstack.append(whole)
            kwargs = kwargs | {"deepstack_visual_embeds": None, "visual_pos_masks": None}
        return args, kwargs

    def before_layer(
        self, number: int, layer: Any, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, Any] | None:
        """Cut if one is due; give the layer its segment's mask and positions."""
        hidden = args[0] if args else kwargs.pop("hidden_states")
        if self.prefill and 0 < number <= len(self.deepstack):
            columns, valid = self.now.column.to(hidden.device), self.now.valid.to(hidden.device)
            hidden = hidden + take(self.deepstack[number - 1], columns) * valid[..., None]
        if number == 0 and self.prefill and self.now.left and self.reducer.chooses_queries:
            with measured(SELECTION, hidden.device, self.trace):
                shape = len(self.now.left), compact(self.now.asked)[0].shape[1]
                self.query_mask = torch.zeros(shape, dtype=torch.bool, device=hidden.device)
                for group in alike(self.now.left):
                    tokens = self._tokens(0, layer, hidden, kwargs, group)
                    self.query_mask[group] = self.reducer.query_mask(tokens)
        if self.prefill and number in self.due:
            with measured(SELECTION, hidden.device, self.trace):
                hidden = self._cut(number, layer, hidden, kwargs)
        elif number in self.segments:
            self._extend(number, hidden, kwargs)
        kwargs = self._seen_by(number, kwargs)
        if self.prefill and number + 1 in self.due:
            self.stash = (layer, hidden, kwargs["position_embeddings"])
        return (hidden,), kwargs

    def _seen_by(self, number: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of layer `number`: its segment's mask and positions replace the model's."""
        starts = [start for start in self.segments if start <= number]
        return kwargs | self.segments[max(starts)].kwargs if starts else kwargs

    def _tokens(
        self, number: int, layer: Any, hidden: Tensor, kwargs: dict[str, Any], images: list[int]
    ) -> DecoderTokens:
        """What the method sees before layer `number` of images with equally many tokens.

        `kwargs` are those of the layer before.
        """

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(hidden.device)

        source, before, rotary = layer, hidden, kwargs["position_embeddings"]
        if number and self.reducer.reads == "before":
            source, before, rotary = self.stash
        index, real = map(moved, compact(self.now.asked))
        rows_of, columns_of = self.now.images()
        row, valid = moved(rows_of[images]), moved(self.now.valid)
        texts, asked = index[row], real[row]
        at = (row[:, None], moved(torch.stack([columns_of[image] for image in images])))
        text_at = (row[:, None], texts)

        def queries_at(places: Tensor, real: Tensor) -> AttentionRows:
            query, key = decoder_query_key(source, before, rotary, places)
            columns, scale = torch.where(real, places, -1)[row], source.self_attn.scaling
            return AttentionRows(query[row], key[row], columns, valid[row], at[1], scale)

        def rows(queries: slice) -> AttentionRows:
            return queries_at(index[:, queries], real[:, queries])

        def every() -> AttentionRows:
            places = torch.arange(valid.shape[1], device=valid.device)
            return queries_at(places.expand(len(valid), -1), valid)

        def keys() -> tuple[Tensor, Tensor]:
            unturned = decoder_keys(source, before)
            return unturned[at], unturned[text_at]

        norm = self.family.decoder.norm
        return DecoderTokens(hidden[at], hidden[text_at], asked, asked, rows, every, keys, norm)

    def _cut(self, number: int, layer: Any, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Hidden states of what is kept; notes where it stands."""
        seen, device, now = self._seen_by(number - 1, kwargs), hidden.device, self.now
        due = [min(n, self.due[number].get(i, n)) for i, n in enumerate(now.left)]
        rows, columns = now.images()
        keep, changed = now.valid & (now.ordinal < 0), hidden
        kept: list[Tensor] = list(self.trace.kept)
        for group in alike(list(zip(now.left, due, strict=True))):
            count, wanted = now.left[group[0]], due[group[0]]
            places = [torch.arange(count)] * len(group)
            features: list[Tensor] = []
            if wanted < count:
                tokens = self._tokens(number, layer, hidden, seen, group)
                if self.reducer.chooses_queries:
                    tokens = replace(tokens, query_mask=self.query_mask[group])
                reduced = self.reducer.reduce(tokens, wanted)
                places, features = on_host(reduced.indices), reduced.features
            row = torch.cat([rows[i].expand(len(p)) for i, p in zip(group, places, strict=True)])
            column = torch.cat([columns[i][p] for i, p in zip(group, places, strict=True)])
            keep[row, column] = True
            if features:
                at = (row.to(device), column.to(device))
                changed = changed.index_put(at, torch.cat(features))
            split = now.place[row, column].split([len(own) for own in places])
            for image, own in zip(group, split, strict=True):
                kept[image] = own
        index, valid = compact(keep, self.right_padded)
        tables: tuple[Tensor, ...] = ()
        positions = valid.cumsum(1) - 1
        if not self.contiguous:
            cos, sin = seen["position_embeddings"]
            tables = cos.expand(len(hidden), -1, -1), sin.expand(len(hidden), -1, -1)
            old = now.valid.cumsum(1) - 1
            if seen.get("position_ids") is not None and not self.family.mrope:
                old = seen["position_ids"].expand(len(hidden), -1).cpu()
            positions = old.gather(1, index)
        self.now = now.taken(index, valid, [len(places) for places in kept])
        _, (hidden, *rotary) = self.reducer.compact(
            keep.to(device), changed, *tables, right_padded=self.right_padded
        )
        dropped = now.valid.sum(1, keepdim=True) - valid.sum(1, keepdim=True)
        if self.segments:
            dropped = dropped + self.segments[max(self.segments)].dropped
        positions = positions * valid
        segment = Segment(valid, dropped, self.now.column, positions)
        segment.rebuild(self.family.decoder, number, hidden, positions, kwargs, tuple(rotary))
        self.segments[number] = segment
        self.trace.kept = kept
        self.trace.cuts.append(kept)
        layers = len(self.trace.computed)
        self.trace.computed[number:] = [self.now.left] * (layers - number)
        return hidden

    def _extend(self, number: int, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        segment, length = self.segments[number], hidden.shape[1]
        new = torch.arange(self.seen - length, self.seen)
        valid = torch.cat([segment.valid, self.incoming], 1)
        positions = (valid.cumsum(1) - 1)[:, -length:]
        if self.steps is not None:
            positions = self.steps.expand(len(hidden), -1)
        rotary = kwargs["position_embeddings"]
        if self.contiguous:
            positions, rotary = positions - segment.dropped, ()
        segment.valid = valid
        segment.columns = torch.cat([segment.columns, new.expand(len(hidden), -1)], 1)
        segment.positions = torch.cat([segment.positions, positions], 1)
        segment.rebuild(self.family.decoder, number, hidden, positions, kwargs, rotary)


@contextmanager
def pruned(
    model: Any,
    cuts: CutsFor,
    reducer: Reducer,
    positions: Positions,
    trace: Trace | None = None,
) -> Iterator[Trace]:
    """Let `reducer` reduce the image tokens at `cuts` while the block is open.

    `cuts` gives those of an image by its number of tokens before any pruning. Without a cache each
    forward scores anew with the text so far. Where the prompt is shortened first, `trace` is that
    of the shortening, and goes on here.
    """
    stack = _MidStack(model, cuts, reducer, positions, trace)
    family = stack.family
    hooks = [
        family.multimodal.register_forward_pre_hook(stack.before_model, with_kwargs=True),
        family.decoder.register_forward_pre_hook(stack.before_decoder, with_kwargs=True),
    ]
    for number, layer in enumerate(family.decoder.layers):
        hook = partial(stack.before_layer, number)
        hooks.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield stack.trace
    finally:
        for handle in hooks:
            handle.remove()
