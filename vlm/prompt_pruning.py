"""The pre-LLM route: encode, reduce, gather the prompt, generate; any `generate` call works."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from vlm_prune.vlm.cache import cache_of
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.encoded import Group, Images
from vlm_prune.vlm.families import Family, family_of
from vlm_prune.vlm.layout import image_ordinals, image_places, question_places
from vlm_prune.vlm.tokens import Kept, VisionTokens, compact, is_right_padded
from vlm_prune.vlm.trace import SELECTION, VISION, Trace, measured

Positions = Literal["auto", "contiguous", "original"]


def keeps_positions(family: Family, positions: Positions) -> bool:
    """Whether kept tokens keep the positions that they had in the full prompt.

    Raises:
        InputError: when the family's positions cannot be renumbered.
    """
    if positions == "contiguous" and family.mrope:
        raise InputError(
            "positions 'contiguous' would lose the rows and columns of this model's positions; "
            "give 'auto' or 'original'"
        )
    return positions == "original" or family.mrope


@dataclass(frozen=True)
class Prompt:
    """A prompt with fewer image placeholders: the arguments of `generate` or `forward`."""

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor


def shorten(
    input_ids: Tensor,
    valid: Tensor,
    ordinal: Tensor,
    counts: list[int],
    places: list[Tensor],
    full: Tensor | None,
) -> Prompt:
    """Drop the placeholders of dropped image tokens.

    Shapes: input_ids, valid and ordinal (B, L); `full` (B, L) or (4, B, L) holds the positions in
    the full prompt, which stay; without it positions are renumbered without gaps.
    """
    rows, columns = image_places(ordinal, counts)
    keep = valid.bool() & (ordinal < 0)
    for row, column, kept in zip(rows, columns, places, strict=True):
        keep[row, column[kept]] = True
    index, mask = compact(keep, is_right_padded(valid))
    positions = mask.cumsum(1) - 1
    if full is not None and full.ndim == 3:
        # the row of the text only orders tokens: gaps in it would read as packed sequences
        spatial = full[1:].gather(2, index.expand(len(full) - 1, -1, -1))
        positions = torch.cat([positions[None], spatial])
    elif full is not None:
        positions = full.gather(1, index)
    ids = torch.where(mask, input_ids.gather(1, index), 0)
    return Prompt(ids, mask.long(), positions * mask)


@contextmanager
def pruned(
    model: Any,
    reduce: Callable[[VisionTokens], Kept],
    positions: Positions,
    pixels: Callable[[Tensor], Tensor] | None,
    vision: Images | None,
) -> Iterator[Trace]:
    """Make `model.generate` and `model(...)` see only the image tokens that `reduce` keeps.

    `generate` returns the layout it returns without the block, full prompt included. Logits of a
    direct forward have the short length. Images encoded beforehand are passed as `vision`; `pixels`
    changes them before they are.
    """
    family = family_of(model)
    original = keeps_positions(family, positions)
    described = ("pixel_values", "mm_token_type_ids", *family.image_inputs)
    trace = Trace()

    @torch.no_grad()
    def arguments(input_ids: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Those of the short prompt; takes the full one's out of `kwargs`."""
        mask = kwargs.pop("attention_mask", None)
        # where tokens stand is worked out on the host: many steps, each too small for a GPU
        ids = input_ids.cpu()
        valid = torch.ones_like(ids) if mask is None else mask.cpu()
        inputs = {name: kwargs.pop(name, None) for name in described}
        inputs = {name: value for name, value in inputs.items() if value is not None}
        images = vision
        if "pixel_values" in inputs:
            with measured(VISION, family.device, trace):
                seen = inputs["pixel_values"] if pixels is None else pixels(inputs["pixel_values"])
                images = family.encode(**(inputs | {"pixel_values": seen, "input_ids": input_ids}))
        assert images is not None
        is_image = ids == family.image_token
        counts = images.counts if pixels is None else family.sizes(input_ids, inputs)
        ordinal = image_ordinals(is_image, counts)
        rows, _ = image_places(ordinal, counts)
        asked = question_places(is_image, valid)

        def questions(members: list[int]) -> tuple[Tensor, ...]:
            embed = model.get_input_embeddings()
            return tuple(embed(ids[row][asked[row]].to(input_ids.device)) for row in rows[members])

        def reduced(group: Group) -> Kept:
            return reduce(replace(group.tokens, question=partial(questions, group.members)))

        with measured(SELECTION, family.device, trace):
            kept, deepstack = images.reduce(reduced)
            places = on_host(kept.indices)
        trace.kept = trace.entered = places
        trace.available = counts
        trace.computed = [list(map(len, places))] * len(family.decoder.layers)
        full = None
        if original:
            full = family.positions(input_ids, valid.to(input_ids.device), images.inputs).cpu()
        short = shorten(ids, valid, ordinal, counts, places, full)
        moved = {name: tensor.to(input_ids.device) for name, tensor in vars(short).items()}
        return moved | {"mm_encoder_outputs": family.output(kept.features, deepstack)}

    def before_forward(_: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        past = cache_of(kwargs)
        _refuse_videos(kwargs)
        if kwargs.get("pixel_values") is None or (past is not None and past.get_seq_length()):
            return args, kwargs
        kwargs = dict(kwargs)
        ids = kwargs.pop("input_ids") if "input_ids" in kwargs else args[0]
        short = arguments(ids, kwargs)
        return (), kwargs | short

    generate = model.generate

    def pruned_generate(inputs: Tensor | None = None, **kwargs: Any) -> Any:
        ids = kwargs.pop("input_ids", inputs)
        _refuse_videos(kwargs)
        if ids is None or (kwargs.get("pixel_values") is None and vision is None):
            return generate(ids, **kwargs)
        for replaced in ("position_ids", "mm_encoder_outputs"):
            kwargs.pop(replaced, None)
        short = arguments(ids, kwargs)
        if "max_length" in kwargs and "max_new_tokens" not in kwargs:
            kwargs["max_new_tokens"] = kwargs.pop("max_length") - ids.shape[1]
        if kwargs.get("streamer") is not None:
            kwargs["streamer"] = _PromptStreamer(kwargs["streamer"], ids)
        output = generate(**kwargs, **short)
        return _with_prompt(output, ids, short["input_ids"].shape[1])

    hook = model.register_forward_pre_hook(before_forward, with_kwargs=True)
    model.generate = pruned_generate
    try:
        yield trace
    finally:
        hook.remove()
        del model.generate


def on_host(places: list[Tensor]) -> list[Tensor]:
    """Each image's places on the CPU, in one transfer."""
    return list(torch.cat(places).cpu().split([len(own) for own in places])) if places else []


def _refuse_videos(kwargs: dict[str, Any]) -> None:
    if kwargs.get("pixel_values_videos") is not None:
        raise InputError("videos are not pruned; give their frames as images")


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
