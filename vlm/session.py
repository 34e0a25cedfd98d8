"""The pre-LLM route: encode, reduce, gather the prompt, generate; any `generate` call works."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlm_prune.vlm.families import family_of
from vlm_prune.vlm.tokens import (
    Kept,
    Trace,
    VisionTokens,
    compact,
    image_ordinals,
    image_places,
    is_right_padded,
    question_places,
)

Positions = Literal["auto", "contiguous", "original"]


def now(device: torch.device) -> float:
    """Seconds, after everything queued on the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def image_output(features: list[Tensor]) -> dict[str, BaseModelOutputWithPooling]:
    """Encoded images as `generate(mm_encoder_outputs=...)` takes them; made anew for each call."""
    return {"image": BaseModelOutputWithPooling(pooler_output=list(features))}


@dataclass(frozen=True)
class Prompt:
    """A prompt with fewer image placeholders: the arguments of `generate` or `forward`."""

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    features: list[Tensor]

    def arguments(self) -> dict[str, Any]:
        kwargs = {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
        }
        return kwargs | {"mm_encoder_outputs": image_output(self.features)}


def shorten(
    input_ids: Tensor, attention_mask: Tensor | None, image_token: int, kept: Kept, original: bool
) -> Prompt:
    """Drop the placeholders of dropped image tokens.

    Shapes: input_ids and attention_mask (B, L). `original` keeps the position that each token had
    in the full prompt; otherwise positions are renumbered without gaps.

    Raises:
        InputError: when the prompt's placeholders do not fit the images.
    """
    valid = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    is_image = input_ids == image_token
    rows, columns = image_places(image_ordinals(is_image, len(kept.places)), len(kept.places))
    keep = valid.bool() & ~is_image
    for row, column, places in zip(rows, columns, kept.places, strict=True):
        keep[row[places], column[places]] = True
    index, mask = compact(keep, is_right_padded(valid))
    positions = ((valid.cumsum(1) - 1).gather(1, index) if original else mask.cumsum(1) - 1) * mask
    ids = torch.where(mask, input_ids.gather(1, index), 0)
    return Prompt(ids, mask.long(), positions, kept.features)


def question_embeddings(
    model: Any, input_ids: Tensor, attention_mask: Tensor | None, image_token: int, images: int
) -> tuple[Tensor, ...]:
    """For each image the embeddings (T, d_l) of the text after the last image of its row."""
    is_image = input_ids == image_token
    valid = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    rows, _ = image_places(image_ordinals(is_image, images), images)
    asked = question_places(is_image, valid)
    embed = model.get_input_embeddings()
    return tuple(embed(input_ids[row][asked[row]]) for row in rows[:, 0])


@contextmanager
def pruned(
    model: Any,
    reduce: Callable[[VisionTokens], Kept],
    positions: Positions,
    pixels: Callable[[Tensor], Tensor],
    vision: VisionTokens | None,
) -> Iterator[Trace]:
    """Make `model.generate` and `model(...)` see only the image tokens that `reduce` keeps.

    `generate` returns the layout it returns without the block, full prompt included. Logits of a
    direct forward have the short length. Images encoded beforehand are passed as `vision`.
    """
    family = family_of(model)
    trace = Trace()

    @torch.no_grad()
    def prompt(input_ids: Tensor, mask: Tensor | None, pixel_values: Tensor | None) -> Prompt:
        tokens = vision
        if pixel_values is not None:
            start = now(model.device)
            tokens = family.encode(pixels(pixel_values))
            trace.vision_s += now(model.device) - start
        assert tokens is not None
        asked = partial(
            question_embeddings, model, input_ids, mask, family.image_token, len(tokens.projected)
        )
        tokens = replace(tokens, question=asked)
        start = now(model.device)
        kept = reduce(tokens)
        trace.selection_s += now(model.device) - start
        trace.kept = trace.entered = kept.places
        mean = sum(len(places) for places in kept.places) / max(1, len(kept.places))
        trace.layer_tokens = [mean] * len(family.decoder.layers)
        return shorten(input_ids, mask, family.image_token, kept, positions == "original")

    def prunes(kwargs: dict[str, Any]) -> bool:
        return kwargs.get("pixel_values") is not None or vision is not None

    def before_forward(_: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        past = kwargs.get("past_key_values")
        if kwargs.get("pixel_values") is None or (past is not None and past.get_seq_length()):
            return args, kwargs
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        short = prompt(ids, kwargs.get("attention_mask"), kwargs.pop("pixel_values"))
        return (), kwargs | short.arguments()

    generate = model.generate

    def pruned_generate(inputs: Tensor | None = None, **kwargs: Any) -> Any:
        ids = kwargs.pop("input_ids", inputs)
        if ids is None or not prunes(kwargs):
            return generate(ids, **kwargs)
        short = prompt(ids, kwargs.pop("attention_mask", None), kwargs.pop("pixel_values", None))
        for replaced in ("position_ids", "mm_encoder_outputs"):
            kwargs.pop(replaced, None)
        if "max_length" in kwargs and "max_new_tokens" not in kwargs:
            kwargs["max_new_tokens"] = kwargs.pop("max_length") - ids.shape[1]
        if kwargs.get("streamer") is not None:
            kwargs["streamer"] = _PromptStreamer(kwargs["streamer"], ids)
        output = generate(**kwargs, **short.arguments())
        return _with_prompt(output, ids, short.input_ids.shape[1])

    hook = model.register_forward_pre_hook(before_forward, with_kwargs=True)
    model.generate = pruned_generate
    try:
        yield trace
    finally:
        hook.remove()
        del model.generate


def _with_prompt(output: Any, ids: Tensor, short: int) -> Any:
    sequences = output if isinstance(output, Tensor) else output.sequences
    full = ids.to(sequences.device).repeat_interleave(len(sequences) // len(ids), dim=0)
    sequences = torch.cat([full, sequences[:, short:]], 1)
    if isinstance(output, Tensor):
        return sequences
    output.sequences = sequences
    return output


class _PromptStreamer:
    """Hands a streamer the full prompt where `generate` would give it the short one."""

    def __init__(self, streamer: Any, ids: Tensor) -> None:
        self.streamer, self.ids, self.started = streamer, ids, False

    def put(self, value: Tensor) -> None:
        self.streamer.put(value if self.started else self.ids.cpu())
        self.started = True

    def end(self) -> None:
        self.streamer.end()
