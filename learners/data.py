"""Conversations in LLaVA's JSON format, as token sequences that teach the assistant's turns."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.images import open_image

IGNORED = -100
PLACEHOLDER = "<image>"


@dataclass(frozen=True)
class Example:
    """Alternating user and assistant texts; `<image>` in a user's text stands for the next image."""

    name: str
    images: tuple[Path, ...]
    turns: tuple[tuple[str, str], ...]


def read_llava(path: str | Path, images: str | Path = ".") -> list[Example]:
    """Read `{"id", "image" (optional, one or a list), "conversations"}`, one JSON list or JSON lines.

    Args:
        path: a file that holds a list, or one entry a line if it ends in `.jsonl`.
        images: folder that image names are relative to.

    Raises:
        InputError: if the file or an entry of it is not in this format, or an image is missing.
    """
    path = Path(path)
    lines = path.suffix == ".jsonl"
    try:
        text = path.read_text(encoding="utf-8")
        entries = None if lines else json.loads(text)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    if lines:
        numbered = [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
        return [
            _example(_entry(path, n, line), f"{path}:{n}", Path(images)) for n, line in numbered
        ]
    if not isinstance(entries, list):
        raise InputError(f"{path} must hold a JSON list of conversations")
    return [_example(entry, f"{path}[{n}]", Path(images)) for n, entry in enumerate(entries)]


def _entry(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise InputError(f"{path}:{number} is no JSON: {error}") from None


def _example(entry: Any, where: str, images: Path) -> Example:
    if isinstance(entry, dict) and "id" in entry:
        where = f"{where} (id {entry['id']!r})"
    try:
        turns = [(turn["from"], turn["value"]) for turn in entry["conversations"]]
        named = entry.get("image") or []
    except (TypeError, KeyError, AttributeError):
        raise InputError(f"{where} needs 'conversations', a list of {{'from', 'value'}}") from None
    if not turns or [who for who, _ in turns] != ["human", "gpt"] * (len(turns) // 2):
        raise InputError(f"{where}: turns must alternate 'human', 'gpt'")
    if not all(isinstance(text, str) for _, text in turns):
        raise InputError(f"{where}: every 'value' must be a text")
    files = [named] if isinstance(named, str) else named
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        raise InputError(f"{where}: 'image' must be a file name or a list of them")
    pairs = tuple((turns[n][1], turns[n + 1][1]) for n in range(0, len(turns), 2))
    shown = sum(asked.count(PLACEHOLDER) for asked, _ in pairs)
    if shown != len(files):
        raise InputError(f"{where}: {shown} {PLACEHOLDER} placeholders for {len(files)} images")
    missing = [images / file for file in files if not (images / file).is_file()]
    if missing:
        raise InputError(f"{where}: there is no image file {missing[0]}")
    return Example(where, tuple(images / file for file in files), pairs)


def messages(example: Example) -> list[dict[str, Any]]:
    """The conversation as chat templates take it; templates add the line break after an image."""
    chat: list[dict[str, Any]] = []
    for asked, answer in example.turns:
        content: list[dict[str, str]] = []
        for number, text in enumerate(asked.split(PLACEHOLDER)):
            content += [{"type": "image"}] if number else []
            text = text.strip("\n")
            content += [{"type": "text", "text": text}] if text else []
        chat.append({"role": "user", "content": content})
        chat.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return chat


def encode(
    example: Example, processor: Any, image_token: int, tokens_per_image: int, max_length: int
) -> tuple[Tensor, Tensor]:
    """Token ids and labels, both (L,), with -100 on everything but the assistant's turns.

    Every turn is tokenized where a prompt for it would end, so training sees the tokens that
    generation will.

    Raises:
        InputError: if `max_length` cuts into an image, or the chat template writes a reply
            differently from its generation prompt.
    """
    chat, written = messages(example), ""
    ids: list[int] = []
    labels: list[int] = []
    for turn in range(1, len(chat), 2):
        prompt = processor.apply_chat_template(chat[:turn], add_generation_prompt=True)
        whole = processor.apply_chat_template(chat[: turn + 1])
        if not (prompt.startswith(written) and whole.startswith(prompt)):
            raise InputError("the chat template does not continue its own generation prompt")
        for text, taught in ((prompt[len(written) :], False), (whole[len(prompt) :], True)):
            piece = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += piece
            labels += piece if taught else [IGNORED] * len(piece)
        written = whole
    tokens, targets = torch.tensor(ids), torch.tensor(labels)
    repeats = torch.where(tokens == image_token, tokens_per_image, 1)
    tokens, targets = tokens.repeat_interleave(repeats), targets.repeat_interleave(repeats)
    if (tokens[max_length:] == image_token).any():
        raise InputError(f"{example.name}: the images do not fit into {max_length} tokens")
    return tokens[:max_length], targets[:max_length]


def order(images: Sequence[bool], text_ratio: float | None, epochs: int, seed: int) -> list[int]:
    """The indices of all samples of a run.

    Args:
        images: for each sample whether it has an image.
        text_ratio: share of text-only samples, in [0, 1]. All samples with an image are used, and
            text-only ones as often as that needs; at 1 only text. None takes each sample once.
        epochs: how often that is repeated, shuffled anew.
        seed: of the shuffling.

    Raises:
        InputError: when the ratio is out of range, or the samples it asks for do not exist.
    """
    with_image = [n for n, has in enumerate(images) if has]
    text = [n for n, has in enumerate(images) if not has]
    number = len(text)
    if text_ratio is not None:
        if not 0 <= text_ratio <= 1:
            raise InputError(f"text ratio {text_ratio} is out of range; give 0 to 1")
        if text_ratio == 1:
            with_image = []
        else:
            number = round(len(with_image) * text_ratio / (1 - text_ratio))
        if number and not text:
            raise InputError(f"a text ratio of {text_ratio} needs samples without an image")
    if not number + len(with_image):
        raise InputError("there is nothing to train on; give data with conversations")
    generator = torch.Generator().manual_seed(seed)

    def shuffled(values: list[int]) -> list[int]:
        return [values[k] for k in torch.randperm(len(values), generator=generator).tolist()]

    drawn: list[int] = []
    for _ in range(epochs):
        replay: list[int] = []
        while len(replay) < number:
            replay += shuffled(text)
        drawn += shuffled(with_image + replay[:number])
    return drawn


class Conversations(Dataset[dict[str, Tensor]]):
    """Examples as `input_ids`, `labels` and `pixel_values` (images, 3, H, W)."""

    def __init__(
        self,
        examples: list[Example],
        processor: Any,
        image_token: int,
        tokens_per_image: int,
        max_length: int,
    ) -> None:
        self.examples, self.processor = examples, processor
        self.layout = image_token, tokens_per_image, max_length

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        example = self.examples[index]
        ids, labels = encode(example, self.processor, *self.layout)
        row = {"input_ids": ids, "labels": labels}
        if example.images:
            try:
                opened = [open_image(path) for path in example.images]
            except InputError as error:
                raise InputError(f"{example.name}: {error}") from error
            row |= self.processor.image_processor(images=opened, return_tensors="pt")
        return row


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Pad on the right; a batch without images has no `pixel_values`, and skips the vision tower."""
    batch = {
        name: torch.nn.utils.rnn.pad_sequence(
            [row[name] for row in rows], batch_first=True, padding_value=fill
        )
        for name, fill in (("input_ids", 0), ("labels", IGNORED))
    }
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    columns = torch.arange(batch["input_ids"].shape[1])
    batch["attention_mask"] = (columns < lengths[:, None]).long()
    pixels = [row["pixel_values"] for row in rows if "pixel_values" in row]
    return batch | ({"pixel_values": torch.cat(pixels)} if pixels else {})
