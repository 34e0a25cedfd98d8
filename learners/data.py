"""Conversations in LLaVA's JSON format, as token sequences that teach the assistant's turns."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from vlm_prune.learners.parquet import PackedImage, read_parquet_rows
from vlm_prune.vlm.chat import encode_text, render
from vlm_prune.vlm.common.errors import InputError, first_line
from vlm_prune.vlm.common.images import open_image
from vlm_prune.vlm.common.paths import DataRoot

IGNORED = -100
PLACEHOLDER = "<image>"
OTHER_MEDIA = ("video", "videos", "audio", "audios")
# of a chat template, for each turn: more than any template adds
TEMPLATE_TOKENS = 64


@dataclass(frozen=True)
class Example:
    """Alternating user and assistant texts; `<image>` in a user's text stands for the next image."""

    name: str
    images: tuple[Path | PackedImage, ...]
    turns: tuple[tuple[str, str], ...]

    def opened(self, most: int | None = None) -> list[Image.Image]:
        """Returns its images, or the first `most` of them.

        Raises:
            InputError: if one cannot be read.
        """
        packed = (f.open() if isinstance(f, PackedImage) else f for f in self.images[:most])
        return [open_image(source) for source in packed]


def read_llava(
    path: str | Path, images: str | Path | DataRoot = ".", left_out: list[str] | None = None
) -> list[Example]:
    """Reads `{"id", "image" (optional, one or a list), "conversations"}`: one JSON list, JSON
    lines or the rows of a Parquet file, which may hold the pictures themselves.

    Args:
        path: a file that holds a list, one entry a line if it ends in `.jsonl`, or one entry a row
            if it ends in `.parquet`.
        images: folder that image names are relative to, and must not leave unless it is a
            `DataRoot` that allows it.
        left_out: takes a line on each entry that cannot be used, and these are left out; None
            refuses the first of them.

    Raises:
        InputError: if the file is not in this format, or an entry of it cannot be used: it is in
            another format, shows a video or audio, or an image is missing.
    """
    path, root = Path(path), DataRoot.of(images)
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is no regular file; give a JSON file")
    try:
        text = "" if path.suffix == ".parquet" else path.read_text(encoding="utf-8-sig")
        numbered: Iterable[tuple[str, Any]]
        if path.suffix == ".parquet":
            numbered = ((f"{path}[{n}]", row) for n, row in enumerate(read_parquet_rows(path)))
        elif path.suffix == ".jsonl":
            # not splitlines: JSON may hold other characters that it takes for the end of a line
            lines = enumerate(text.split("\n"), 1)
            numbered = [(f"{path}:{n}", line) for n, line in lines if line.strip()]
        else:
            entries = json.loads(text)
            if not isinstance(entries, list):
                raise InputError(f"{path} must hold a JSON list of conversations")
            numbered = [(f"{path}[{n}]", entry) for n, entry in enumerate(entries)]
    except InputError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {path}: {first_line(error)}") from error
    examples = []
    for where, entry in numbered:
        try:
            if path.suffix == ".jsonl":
                entry = _entry(where, entry)
            examples.append(_example(entry, where, root))
        except InputError as error:
            if left_out is None:
                raise
            left_out.append(str(error))
    return examples


def _entry(where: str, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is no JSON: {first_line(error)}") from None


def _example(entry: Any, where: str, root: DataRoot) -> Example:
    """Reads one conversation with its images.

    Args:
        entry: what the file holds.
        where: for messages, file and number of the entry.
        root: of the images.

    Raises:
        InputError: if it is of another format, or an image is missing.
    """
    if isinstance(entry, dict) and "id" in entry:
        where = f"{where} (id {repr(entry['id'])[:80]})"
    try:
        turns = [(turn["from"], turn["value"]) for turn in entry["conversations"]]
        named = entry.get("image") or []
        other = [kind for kind in OTHER_MEDIA if entry.get(kind)]
    except (TypeError, KeyError, AttributeError):
        raise InputError(f"{where} needs 'conversations', a list of {{'from', 'value'}}") from None
    if other:
        raise InputError(
            f"{where} has {other[0]!r}, and only images and text are read; leave it out (--skip-bad)"
        )
    if not turns or [role for role, _ in turns] != ["human", "gpt"] * (len(turns) // 2):
        raise InputError(f"{where}: turns must alternate 'human', 'gpt'")
    if not all(isinstance(text, str) for _, text in turns):
        raise InputError(f"{where}: every 'value' must be a text")
    if any("\ud800" <= character <= "\udfff" for _, text in turns for character in text):
        raise InputError(f"{where}: a 'value' is no Unicode text")
    files = [named] if isinstance(named, str) else named
    if not isinstance(files, list) or not all(isinstance(f, str | PackedImage) for f in files):
        raise InputError(f"{where}: 'image' must be a file name or a list of them")
    pairs = tuple((turns[n][1], turns[n + 1][1]) for n in range(0, len(turns), 2))
    shown = sum(user_text.count(PLACEHOLDER) for user_text, _ in pairs)
    if shown != len(files):
        raise InputError(
            f"{where}: {shown} {PLACEHOLDER} placeholders for {len(files)} images; the questions "
            f"need one for each file under 'image', and no other {PLACEHOLDER}"
        )
    try:
        paths = tuple(f if isinstance(f, PackedImage) else root.path(f) for f in files)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    missing = [path for path in paths if isinstance(path, Path) and not path.is_file()]
    if missing:
        raise InputError(f"{where}: there is no image file {missing[0]}")
    return Example(where, paths, pairs)


def messages(example: Example) -> list[dict[str, Any]]:
    """Returns the conversation as chat templates take it; templates add
    the line break after an image.
    """
    chat: list[dict[str, Any]] = []
    for user_text, answer in example.turns:
        content: list[dict[str, str]] = []
        for number, text in enumerate(user_text.split(PLACEHOLDER)):
            content += [{"type": "image"}] if number else []
            text = text.strip("\n")
            content += [{"type": "text", "text": text}] if text else []
        chat.append({"role": "user", "content": content})
        chat.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return chat


def encode(
    example: Example, processor: Any, image_token: int, tokens_per_image: int, max_length: int
) -> tuple[Tensor, Tensor]:
    """Returns token ids and labels, both (L,), with -100 on everything but the assistant's turns.

    Every turn is tokenized where a prompt for it would end, so training sees the tokens that
    generation will. Special tokens in the texts, such as the model's image token, are text.

    Args:
        example: a conversation.
        processor: the model's.
        image_token: id of the placeholder of an image token.
        tokens_per_image: placeholders of each image.
        max_length: of the tokens, those of images included.

    Raises:
        InputError: if there are more tokens, or the chat template writes a reply differently from
            its generation prompt.
    """
    chat, written = messages(example), ""
    ids: list[int] = []
    labels: list[int] = []
    for turn in range(1, len(chat), 2):
        try:
            prompt = render(processor, chat[:turn], add_generation_prompt=True)
            whole = render(processor, chat[: turn + 1])
        except InputError as error:
            raise InputError(f"{example.name}: {error}") from error
        if not (prompt.startswith(written) and whole.startswith(prompt)):
            raise InputError("the chat template does not continue its own generation prompt")
        for text, taught in ((prompt[len(written) :], False), (whole[len(prompt) :], True)):
            piece = encode_text(processor, text)
            ids += piece
            labels += piece if taught else [IGNORED] * len(piece)
        written = whole
    tokens, targets = torch.tensor(ids), torch.tensor(labels)
    repeats = torch.where(tokens == image_token, tokens_per_image, 1)
    length = int(repeats.sum())
    if length > max_length:
        raise InputError(
            f"{example.name}: {length} tokens are above the limit of {max_length} (the smaller of "
            "max_length and the model's window); shorten it, or leave it out (--skip-bad)"
        )
    return tokens.repeat_interleave(repeats), targets.repeat_interleave(repeats)


def leave_out_too_long(
    examples: Sequence[Example],
    processor: Any,
    image_token: int,
    tokens_per_image: int,
    max_length: int,
    left_out: list[str] | None = None,
) -> list[Example]:
    """Returns the examples that `encode` takes; only those that may be too long are tokenized.

    Args:
        examples: conversations.
        processor: the model's.
        image_token: id of the placeholder of an image token.
        tokens_per_image: placeholders of each image.
        max_length: of the tokens, those of images included.
        left_out: takes a line on each example that is too long; None refuses the first of them.

    Raises:
        InputError: if an example is too long and `left_out` is None.
    """
    layout = image_token, tokens_per_image, max_length
    fitting = []
    for example in examples:
        # no token is shorter than a byte
        size = sum(len(text.encode("utf-8", "replace")) for turn in example.turns for text in turn)
        size += TEMPLATE_TOKENS * (1 + len(example.turns)) + tokens_per_image * len(example.images)
        try:
            if size > max_length:
                encode(example, processor, *layout)
            fitting.append(example)
        except InputError as error:
            if left_out is None:
                raise
            left_out.append(str(error))
    return fitting


def order(images: Sequence[bool], text_ratio: float | None, epochs: int, seed: int) -> list[int]:
    """Returns the indices of all samples of a run, in the order in which they are trained.

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
    """Examples as `input_ids`, `labels` and `pixel_values` (images, 3, H, W).

    Args:
        examples: conversations.
        processor: the model's.
        image_token: id of the placeholder of an image token.
        tokens_per_image: placeholders of each image.
        max_length: of the tokens, those of images included.
        check_size: refuses images of a width and height, given the image processor.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        processor: Any,
        image_token: int,
        tokens_per_image: int,
        max_length: int,
        check_size: Callable[[Any, int, int], None] = lambda processor, width, height: None,
    ) -> None:
        self.examples, self.processor, self.check_size = examples, processor, check_size
        self.layout = image_token, tokens_per_image, max_length

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        example, image_processor = self.examples[index], self.processor.image_processor
        ids, labels = encode(example, self.processor, *self.layout)
        row = {"input_ids": ids, "labels": labels}
        if example.images:
            try:
                opened = example.opened()
                for image in opened:
                    self.check_size(image_processor, *image.size)
                row |= image_processor(images=opened, return_tensors="pt")
            except ValueError as error:
                raise InputError(f"{example.name}: {first_line(error)}") from error
        return row


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Pads on the right; a batch without images has no
    `pixel_values`, and skips the vision tower.
    """
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
