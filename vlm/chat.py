"""Conversations as a processor takes them, in which what people write is text.

A model's special tokens, such as the placeholder of an image or the end of a turn, count where the
chat template writes them. In questions, replies and options the same characters are text: while a
conversation is rendered one private character stands for each such token, and in the end the tokens
of its plain characters take that character's place.
"""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jinja2 import TemplateError
from torch import Tensor

from vlm_prune.vlm.common.errors import InputError, first_line
from vlm_prune.vlm.common.images import ImageSource, open_image
from vlm_prune.vlm.common.video import VideoClip
from vlm_prune.vlm.families import FAMILIES, Family, family_of

# turns, each with a `role` and a `content`: a string, or parts as `transformers` has them
Messages = list[dict[str, Any]]
# the end of the last private plane, one character for each special token
FIRST, LAST = 0x10E000, 0x10FFFD
STAND_INS = re.compile(f"[{chr(FIRST)}-{chr(LAST)}]")


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens of a processor, which the n-th private character stands for."""

    names: tuple[str, ...]
    pattern: re.Pattern[str]

    def hide(self, text: str) -> str:
        """Returns the text with a private character in place of every special token.

        Raises:
            InputError: if it is no Unicode text.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"the text {text[:60]!r} is no Unicode ({error.reason}); mend it"
            ) from None
        foreign = STAND_INS.sub("\N{REPLACEMENT CHARACTER}", text)
        return self.pattern.sub(lambda found: chr(FIRST + self.names.index(found[0])), foreign)


_special: WeakKeyDictionary[Any, SpecialTokens] = WeakKeyDictionary()
_widened: WeakKeyDictionary[Any, tuple[Any, dict[int, list[int]]]] = WeakKeyDictionary()


def special_tokens(processor: Any) -> SpecialTokens:
    """Returns the special tokens of a processor or a tokenizer."""
    if processor not in _special:
        tokenizer = getattr(processor, "tokenizer", processor)
        added = list(tokenizer.added_tokens_decoder.values())
        names = {str(token) for token in added if token.special}
        # some checkpoints hold placeholders as tokens that are not marked as special
        declared = {value for key, value in vars(processor).items() if key.endswith("_token")}
        names |= declared & set(map(str, added))
        longest_first = sorted(names - {""}, key=lambda name: (-len(name), name))
        longest_first = longest_first[: LAST - FIRST]
        pattern = "|".join(map(re.escape, longest_first)) or "(?!)"
        _special[processor] = SpecialTokens(tuple(longest_first), re.compile(pattern))
    return _special[processor]


def render(processor: Any, messages: Messages, **options: Any) -> str:
    """Returns a conversation as its chat template writes it, special
    tokens in people's text hidden.

    Only `encode_text` and `encode_prompts` read such a string.

    Args:
        processor: a processor, or the tokenizer of a language model.
        messages: a conversation.
        options: of the template, such as `add_generation_prompt`.

    Raises:
        InputError: if there is no chat template, or it does not take the conversation.
    """
    special = special_tokens(processor)

    def hidden(content: Any) -> Any:
        if isinstance(content, str):
            return special.hide(content)
        return [
            part | {"text": special.hide(part["text"])} if part["type"] == "text" else part
            for part in content
        ]

    chat = [turn | {"content": hidden(turn["content"])} for turn in messages]
    try:
        return str(processor.apply_chat_template(chat, tokenize=False, **options))
    except (TemplateError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"the model's chat template cannot be used: {first_line(error)}"
        ) from error


def encode_text(processor: Any, text: str) -> list[int]:
    """Returns the tokens of a piece of a rendered conversation, or of a text that was hidden."""
    tokenizer = getattr(processor, "tokenizer", processor)
    if not STAND_INS.search(text):
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids
    wide, plain = _wide(processor)
    found = wide(text, add_special_tokens=False)["input_ids"]
    return [token for token_id in found for token in plain.get(token_id, [token_id])]


def encode_prompts(
    model: Any,
    processor: Any,
    texts: Sequence[str],
    images: Sequence[Sequence[ImageSource]],
    videos: Sequence[VideoClip] = (),
    **options: Any,
) -> Any:
    """Returns what a processor makes of rendered conversations, their images and
    videos, on the model's device.

    Args:
        model: of a supported family.
        processor: its processor.
        texts: from `render`, one for each row.
        images: those of each row.
        videos: those of all rows, in order.
        options: of the processor; rows are padded on the left unless these say otherwise.

    Raises:
        InputError: if an image cannot be used, or the processor refuses the row.
    """
    family = family_of(model)
    rows = [[open_image(image) for image in row] for row in images]
    for row in rows:
        for image in row:
            family.check_size(processor.image_processor, *image.size)
    flat = [image for row in rows for image in row]
    given: Any = (rows if family.by_row else flat) if flat else None
    options = {"padding": True, "padding_side": "left", "return_tensors": "pt"} | options
    if videos:
        check_videos(family, processor, videos)
        if flat and "pixel_values" in processor.video_processor.model_input_names:
            raise InputError(
                "this model's processor takes either images or videos at a time; give one kind"
            )
        options |= {
            "videos": [clip.frames for clip in videos],
            "video_metadata": [clip.metadata() for clip in videos],
            "do_sample_frames": False,
        }
    hidden = any(map(STAND_INS.search, texts))
    used, plain = processor, dict[int, list[int]]()
    if hidden:
        used = copy.copy(processor)
        used.tokenizer, plain = _wide(processor)
    try:
        inputs = used(text=list(texts), images=given, **options)
    except (ValueError, TypeError, IndexError, ZeroDivisionError) as error:
        raise InputError(f"the model's processor refuses this: {first_line(error)}") from error
    if hidden:
        left = options["padding_side"] == "left"
        _replace(inputs, plain, left, processor.tokenizer.pad_token_id or 0)
    return inputs.to(model.device)


def video_frames_of(
    model: Any, processor: Any, texts: Sequence[str], videos: Sequence[VideoClip] = ()
) -> list[int] | None:
    """Returns the number of frames of each video of rendered conversations, 0 for images, in their
    order; None where frames are no images to the model.

    Args:
        model: of a supported family.
        processor: its processor.
        texts: from `render`, one for each row.
        videos: those of all rows, in order.
    """
    if not family_of(model).frames_as_images:
        return None
    clips, video = iter(videos), processor.video_token
    either = re.compile(f"{re.escape(processor.image_token)}|{re.escape(video)}")
    return [
        len(next(clips).frames) if shown == video else 0
        for text in texts
        for shown in either.findall(text)
    ]


def check_takes_videos(family: Family, processor: Any) -> None:
    """Raises `InputError` unless a model and its processor take videos."""
    if "videos" in family.lacks or getattr(processor, "video_processor", None) is None:
        known = [name for name, adapter in FAMILIES.items() if "videos" not in adapter.lacks]
        raise InputError(
            f"{family.model.config.model_type} models take no videos here; give their frames as images, "
            f"or a model of {', '.join(known)}"
        )


def check_videos(family: Family, processor: Any, videos: Sequence[VideoClip]) -> None:
    """Refuses videos that a model cannot take.

    Args:
        family: the model's adapter.
        processor: of the model.
        videos: clips.

    Raises:
        InputError: if the model takes no videos, or a clip is too short.
    """
    check_takes_videos(family, processor)
    together = getattr(processor.video_processor, "temporal_patch_size", 1)
    shortest = min(len(clip.frames) for clip in videos)
    if shortest < together:
        raise InputError(
            f"a clip of {shortest} frame is shorter than the {together} that this model encodes as one; "
            "give a longer clip, or its frame as an image"
        )
    lengths = {len(clip.frames) for clip in videos}
    if len(lengths) > 1 and together == 1:
        raise InputError(
            f"this model takes clips of equal length at a time, and these have {sorted(lengths)} frames"
        )


def rows_encoded_together(processor: Any, videos: Sequence[Sequence[VideoClip]]) -> list[list[int]]:
    """Returns the rows of a batch in groups that a model takes at a time: those with clips of one
    length, or all of them where it takes several.

    Args:
        processor: of the model.
        videos: of each row.
    """
    together = getattr(getattr(processor, "video_processor", None), "temporal_patch_size", 1)
    groups: dict[frozenset[int], list[int]] = {}
    for number, row in enumerate(videos):
        lengths = frozenset(len(clip.frames) for clip in row)
        groups.setdefault(lengths if together == 1 else frozenset(), []).append(number)
    return list(groups.values())


def _wide(processor: Any) -> tuple[Any, dict[int, list[int]]]:
    """Returns a copy of the tokenizer that knows the private characters,
    and what their tokens become.
    """
    if processor not in _widened:
        from transformers import AddedToken

        tokenizer = getattr(processor, "tokenizer", processor)
        names = special_tokens(processor).names
        wide = copy.deepcopy(tokenizer)
        characters = [chr(FIRST + n) for n in range(len(names))]
        wide.add_tokens(
            [AddedToken(character, special=False, normalized=False) for character in characters]
        )
        ids = wide.convert_tokens_to_ids(characters)
        plain = {}
        for name, number in zip(names, ids, strict=True):
            plain[number] = _after_newline(wide, name)
            # not marked as special: cut it
            if wide.convert_tokens_to_ids(name) in plain[number]:
                plain[number] = [*_after_newline(wide, name[:1]), *_after_newline(wide, name[1:])]
        _widened[processor] = wide, plain
    return _widened[processor]


def _after_newline(tokenizer: Any, text: str) -> list[int]:
    """Returns the tokens of a text behind a line's end; at the start of a text
    some tokenizers add a space.
    """
    options = {"add_special_tokens": False, "split_special_tokens": True}
    end = tokenizer("\n", **options)["input_ids"]
    ids: list[int] = tokenizer(f"\n{text}", **options)["input_ids"]
    return ids[len(end) :] if ids[: len(end)] == end else tokenizer(text, **options)["input_ids"]


def _replace(inputs: Any, plain: dict[int, list[int]], left: bool, pad: int) -> None:
    """Puts tokens of plain characters in place of private ones, in every (B, L) tensor alike.

    Args:
        inputs: of the processor, changed in place.
        plain: by the token of a private character the tokens that replace it.
        left: whether rows are padded on the left.
        pad: the token that pads.
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    rows = [row_ids[valid].tolist() for row_ids, valid in zip(ids, mask, strict=True)]
    counts = [torch.tensor([len(plain.get(token, [token])) for token in row]) for row in rows]
    fills = {"input_ids": pad}
    for name in [key for key, value in inputs.items() if _like(value, ids)]:
        values = [
            row_ids[valid].repeat_interleave(count)
            for row_ids, valid, count in zip(inputs[name], mask, counts, strict=True)
        ]
        if name == "input_ids":
            values = [
                torch.tensor([text_id for token in row for text_id in plain.get(token, [token])])
                for row in rows
            ]
        inputs[name] = torch.nn.utils.rnn.pad_sequence(
            values, batch_first=True, padding_value=fills.get(name, 0),
            padding_side="left" if left else "right",
        )  # fmt: skip


def _like(value: Any, ids: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == ids.shape
