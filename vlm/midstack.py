"""The in-LLM route: drop image tokens between decoder layers of an unmodified model.

Layers before a cut keep all keys and values, layers after it only the kept ones, so cache lengths
differ between layers; masks and positions are rebuilt for each segment.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask

from vlm_prune.vlm.attention import decoder_rows
from vlm_prune.vlm.errors import InputError
from vlm_prune.vlm.families import family_of
from vlm_prune.vlm.session import Positions, now
from vlm_prune.vlm.tokens import Trace, compact, image_ordinals, is_right_padded, top

Score = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Cut:
    """After `layer` decoder layers have run, keep `keep` tokens of each image.

    Scores are read from the attention of the layer before the cut; a cut at 0 prunes the input of
    the first layer and reads that layer's own attention.
    """

    layer: int
    keep: int


@runtime_checkable
class PerToken(Protocol):
    """An argument of decoder layers that holds something for every token so far."""

    def select_tokens(self, columns: Tensor, valid: Tensor, positions: Tensor) -> Self:
        """The part that layers after a cut get: tokens `columns`, all shapes (B, L')."""


@dataclass
class _Segment:
    """What the layers after a cut see; tensors (B, L'), `dropped` (B, 1).

    `columns` says which of the model's tokens they are.
    """

    valid: Tensor
    dropped: Tensor
    columns: Tensor
    positions: Tensor
    kwargs: dict[str, Any]


class _MidStack:
    def __init__(self, model: Any, cuts: list[Cut], score: Score, contiguous: bool) -> None:
        self.family = family_of(model)
        self.cuts = {cut.layer: cut.keep for cut in cuts}
        self.score, self.contiguous = score, contiguous
        self.trace = Trace()
        self.segments: dict[int, _Segment] = {}
        self.prefill = False
        self.seen = 0

    def before_model(self, _: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Note what the prompt looks like, and whether this is a prefill."""
        ids, past = kwargs.get("input_ids"), kwargs.get("past_key_values")
        if ids is None:
            raise InputError("pruning inside the language model needs input_ids, not inputs_embeds")
        mask = kwargs.get("attention_mask")
        self.prefill = past is None or past.get_seq_length() == 0
        if not self.prefill:
            self.incoming = (
                torch.ones_like(ids, dtype=torch.bool)
                if mask is None
                else mask[:, -ids.shape[1] :].bool()
            )
            if kwargs.get("position_ids") is None:
                step = torch.arange(ids.shape[1], device=ids.device)
                ends = self.seen + step if mask is None else (mask.cumsum(1) - 1)[:, -len(step) :]
                kwargs["position_ids"] = ends.expand(len(ids), -1)
            self.seen += ids.shape[1]
            return args, kwargs
        self.seen = ids.shape[1]
        self.valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        self.right_padded = is_right_padded(self.valid)
        encoded = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        pixels = kwargs.get("pixel_values")
        images = 0 if pixels is None else len(pixels)
        images = images if encoded is None else len(encoded.pooler_output)
        is_image = ids == self.family.image_token
        self.ordinal = image_ordinals(is_image, images)
        self.columns = torch.arange(self.seen, device=ids.device).expand(len(ids), -1)
        self.place = torch.zeros_like(ids)
        each = int(is_image.sum()) // images if images else 0
        self.place[is_image] = torch.arange(each, device=ids.device).repeat(images)
        after = is_image.flip(1).cumsum(1).flip(1) == 0
        has_image = is_image.any(1, keepdim=True)
        self.text = after & self.valid & has_image
        self.segments, self.trace.cuts, self.images = {}, [], images
        self.trace.kept = [torch.arange(each)] * images
        self.trace.layer_tokens = [float(each)] * len(self.family.decoder.layers)
        return args, kwargs

    def before_layer(
        self, number: int, layer: Any, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, Any] | None:
        """Cut if one is due; give the layer its segment's mask and positions."""
        hidden = args[0] if args else kwargs.pop("hidden_states")
        if number in self.cuts:
            if self.prefill and self.images:
                hidden = self._cut(number, layer, hidden, kwargs)
            elif number in self.segments:
                self._extend(number, hidden, kwargs)
        kwargs = self._seen_by(number, kwargs)
        if self.prefill and number + 1 in self.cuts:
            self.stash = (layer, hidden, kwargs["position_embeddings"])
        return (hidden,), kwargs

    def _seen_by(self, number: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of layer `number`: its segment's mask and positions replace the model's."""
        starts = [start for start in self.segments if start <= number]
        return kwargs | self.segments[max(starts)].kwargs if starts else kwargs

    def _cut(self, number: int, layer: Any, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        start = now(hidden.device)
        seen = self._seen_by(number - 1, kwargs)
        source, before, rotary = (
            self.stash if number else (layer, hidden, kwargs["position_embeddings"])
        )
        index, valid = compact(self.text, self.right_padded)
        weights = decoder_rows(source, before, rotary, index, valid, self.valid)
        to_text = weights.gather(3, index[:, None, None].expand(-1, *weights.shape[1:3], -1))
        to_text = to_text * valid[:, None, None]
        scores = self.score(to_text, weights * (self.ordinal >= 0)[:, None, None])
        keep = self.valid & (self.ordinal < 0)
        kept: list[Tensor] = []
        for image in range(self.images):
            rows, columns = (self.ordinal == image).nonzero(as_tuple=True)
            best = top(scores[rows, columns], self.cuts[number])
            keep[rows[best], columns[best]] = True
            kept.append(self.place[rows[best], columns[best]])
        gather, valid = compact(keep, self.right_padded)
        old = seen["position_ids"].expand(len(hidden), -1)
        old_length, new_length = self.valid.sum(1, keepdim=True), valid.sum(1, keepdim=True)
        previous = max((s for s in self.segments), default=None)
        dropped = old_length - new_length
        if previous is not None:
            dropped = dropped + self.segments[previous].dropped
        positions = valid.cumsum(1) - 1 if self.contiguous else old.gather(1, gather)
        hidden = hidden.gather(1, gather[..., None].expand(-1, -1, hidden.shape[-1]))
        self.valid, self.text = valid, self.text.gather(1, gather) & valid
        self.ordinal = torch.where(valid, self.ordinal.gather(1, gather), -1)
        self.place, self.columns = self.place.gather(1, gather), self.columns.gather(1, gather)
        positions = positions * valid
        self.segments[number] = _Segment(valid, dropped, self.columns, positions, {})
        self._rebuild(number, hidden, positions, kwargs)
        self.trace.kept = kept
        self.trace.cuts.append(kept)
        mean = sum(map(len, kept)) / len(kept)
        layers = len(self.trace.layer_tokens)
        self.trace.layer_tokens[number:] = [mean] * (layers - number)
        self.trace.selection_s += now(hidden.device) - start
        return hidden

    def _extend(self, number: int, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        segment = self.segments[number]
        segment.valid = torch.cat([segment.valid, self.incoming], 1)
        positions = kwargs["position_ids"].expand(len(hidden), -1)
        if self.contiguous:
            positions = positions - segment.dropped
        new = torch.arange(self.seen - hidden.shape[1], self.seen, device=hidden.device)
        segment.columns = torch.cat([segment.columns, new.expand(len(hidden), -1)], 1)
        segment.positions = torch.cat([segment.positions, positions], 1)
        self._rebuild(number, hidden, positions, kwargs)

    def _rebuild(
        self, number: int, hidden: Tensor, positions: Tensor, kwargs: dict[str, Any]
    ) -> None:
        decoder, segment = self.family.decoder, self.segments[number]
        segment.kwargs = {
            "position_ids": positions,
            "position_embeddings": decoder.rotary_emb(hidden, position_ids=positions),
            "attention_mask": create_causal_mask(
                config=decoder.config,
                inputs_embeds=hidden,
                attention_mask=segment.valid,
                past_key_values=kwargs.get("past_key_values"),
                position_ids=positions,
                layer_idx=number,
            ),
        }
        segment.kwargs |= {
            name: value.select_tokens(segment.columns, segment.valid, segment.positions)
            for name, value in kwargs.items()
            if isinstance(value, PerToken)
        }


@contextmanager
def pruned(model: Any, cuts: list[Cut], score: Score, positions: Positions) -> Iterator[Trace]:
    """Prune image tokens at `cuts` while the block is open.

    `score(to_text, to_vision)` gets the attention of the text rows after the last image, over
    themselves (B, H, T, T) and over all places (B, H, T, L, zero off the image), and returns
    (B, L). Without a cache each forward scores anew with the text so far.
    """
    stack = _MidStack(model, cuts, score, positions != "original")
    hooks = [
        stack.family.multimodal.register_forward_pre_hook(stack.before_model, with_kwargs=True)
    ]
    for number, layer in enumerate(stack.family.decoder.layers):
        hook = partial(stack.before_layer, number)
        hooks.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield stack.trace
    finally:
        for handle in hooks:
            handle.remove()
