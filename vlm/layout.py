"""Where the images of a prompt are, and which of them can be handled together."""

import zlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Self

import torch
from torch import Tensor

from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.tokens import compact

REMEDY = (
    "give the processor text and images together, with one image token in the text for each image, "
    "and pass on its output as it is"
)


def alike(keys: Sequence[Hashable]) -> list[list[int]]:
    """Groups the indices of equal keys, in order of first
    appearance: images that share a tensor.
    """
    groups: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    return list(groups.values())


def image_ordinals(is_image: Tensor, counts: Sequence[int]) -> Tensor:
    """Returns for each prompt position the index of the image it belongs to, -1 for text; (B, L).

    Images come in row order; `counts` says how many placeholders each has.

    Raises:
        InputError: when the placeholders do not fit the images.
    """
    ordinal = torch.full_like(is_image, -1, dtype=torch.long)
    if not counts:
        return ordinal
    found = int(is_image.sum())
    if found != sum(counts) or min(counts) == 0:
        raise InputError(f"{found} image placeholders do not fit {len(counts)} images; {REMEDY}")
    sizes = torch.tensor(counts, device=is_image.device)
    # number each image's placeholders, in reading order
    ordinal[is_image] = torch.arange(len(counts), device=is_image.device).repeat_interleave(sizes)
    return ordinal


def merged_ordinals(
    masks: Sequence[Tensor], counts: Sequence[Sequence[int]]
) -> tuple[Tensor, list[tuple[int, int]]]:
    """Numbers images and videos together, as they stand in the prompt.

    Returns the ordinals (B, L), and for each number its kind and its index among those of its kind.

    Args:
        masks: where the placeholders of each kind are, (B, L).
        counts: placeholders of each image, and of each video, in row order.

    Raises:
        InputError: when the placeholders do not fit.
    """
    ordinals = [image_ordinals(*each) for each in zip(masks, counts, strict=True)]
    length, first = masks[0].shape[1], []
    for kind, ordinal in enumerate(ordinals):
        row, column = (ordinal >= 0).nonzero(as_tuple=True)
        of_kind = ordinal[row, column]
        # the first placeholder of each: row order makes it the first of its number
        starts = torch.searchsorted(of_kind, torch.arange(len(counts[kind]), device=of_kind.device))
        tokens = (row * length + column)[starts].tolist()
        first += [(token, kind, index) for index, token in enumerate(tokens)]
    order = [(kind, index) for _, kind, index in sorted(first)]
    # renumber each kind's placeholders by what stands first in the prompt
    numbers = {item: number for number, item in enumerate(order)}
    merged = torch.full_like(ordinals[0], -1)
    for kind, ordinal in enumerate(ordinals):
        if not counts[kind]:
            continue
        table = torch.tensor([numbers[kind, index] for index in range(len(counts[kind]))])
        merged[ordinal >= 0] = table.to(merged.device)[ordinal[ordinal >= 0]]
    return merged, order


def image_columns(ordinal: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """Returns the columns (n_i,) of each image's tokens in its row, given (B, L) ordinals."""
    return list((ordinal >= 0).nonzero(as_tuple=True)[1].split(list(counts)))


def image_rows(ordinal: Tensor, images: int) -> Tensor:
    """Returns the row that each image is in, (M,), given (B, L) ordinals of
    images that all have tokens.
    """
    rows = torch.zeros(images, dtype=torch.long, device=ordinal.device)
    if not images:
        return rows
    row, column = (ordinal >= 0).nonzero(as_tuple=True)
    # every token writes its row; all of an image agree
    rows[ordinal[row, column]] = row
    return rows


def image_runs(is_image: Tensor) -> list[tuple[int, int, int]]:
    """Returns row, first column and length of every unbroken run of placeholders, in row order."""
    runs = []
    for row, line in enumerate(is_image.tolist()):
        column = 0
        for image, run in groupby(line):
            length = len(list(run))
            runs += [(row, column, length)] if image else []
            column += length
    return runs


def repeated(counts: Sequence[int], is_image: Tensor) -> list[int]:
    """Returns the indices of images, repeated as beam search repeats a
    prompt's rows with their images.

    `counts` says how many placeholders each has; `is_image` (B, L) is the repeated prompt's.
    """
    totals = is_image.sum(1).tolist()
    beams = max(1, sum(totals) // max(1, sum(counts)))
    out, image = [], 0
    for total in totals[::beams]:
        row = []
        # as many images as fill the row's placeholders
        while total > 0:
            row.append(image)
            total -= counts[image]
            image += 1
        out += row * beams
    return out


def question_mask(is_image: Tensor, valid: Tensor) -> Tensor:
    """Returns the mask of the text after the last image of each row
    that has one; all masks (B, L).
    """
    # no placeholder stands at or behind these columns
    after = is_image.flip(1).cumsum(1).flip(1) == 0
    return after & valid.bool() & is_image.any(1, keepdim=True)


def stamped_frames(
    input_ids: Tensor,
    videos: Sequence[int],
    spans: Sequence[tuple[int, int, int]],
    opening: int | None = None,
    separators: int = 0,
) -> Tensor:
    """Returns for each token the frame that it goes with, (B, L); -1 for other tokens.

    The text in front of a frame, such as a time stamp, begins behind the frame before it and what
    separates them; a video's first, behind what opens the video. Where nothing does, it begins with
    the token that begins the next.

    Args:
        input_ids: (B, L).
        videos: which one each frame is of.
        spans: row, first column and end of each frame with its markers.
        opening: the token that may open a video.
        separators: how many tokens behind a frame separate it from the next one, and go with it.
    """
    frame, ids = torch.full_like(input_ids, -1), input_ids.tolist()
    for number, (row, first, last) in enumerate(spans):
        frame[row, first:last] = number
        line, start = ids[row], first
        video = videos[number]
        if number and videos[number - 1] == video:
            end = spans[number - 1][2]
            start = min(end + separators, first)
            frame[row, end:start] = number - 1
        elif videos[number + 1 : number + 2] == [video]:
            # the first text is no longer than the next
            stamp = line[last + separators : spans[number + 1][1]]
            near = range(first, max(0, first - len(stamp) - 1), -1)
            opened = [at for at in near if line[at - 1] == opening]
            start = next(iter(opened + [at for at in near if line[at] in stamp[:1]]), first)
        frame[row, start:first] = number
    return frame


def grid_lines(ordinal: Tensor) -> Tensor:
    """Returns for each token the line of an image's grid that it is in or ends,
    counted over the prompt; -1 for other text.

    Text between tokens of one image ends a line. Ordinals and lines are (B, L).
    """
    shown = ordinal >= 0
    # the image before each column, and the one after it
    before = ordinal.cummax(1).values
    last = int(ordinal.max()) + 1
    after = torch.where(shown, ordinal, last).flip(1).cummin(1).values.flip(1)
    # text between tokens of one image, and where lines begin: at an image's first token and behind
    # such text
    inside = ~shown & (before == after)
    first = shown & (torch.nn.functional.pad(before, (1, 0), value=-1)[:, :-1] != ordinal)
    begins = first | torch.nn.functional.pad(inside, (1, 0))[:, :-1]
    return torch.where(shown | inside, begins.cumsum(1), -1)


@dataclass(frozen=True)
class TokenLayout:
    """The tokens of one forward that a decoder layer gets; tensors (B, n), on the host.

    Args:
        valid: whether it is a token, or padding.
        image: the image it belongs to, -1 for text and padding.
        index: of an image token, its index among the image's placeholders.
        column: its column in the forward's full input.
        prompt_mask: whether it is of the prompt, and not a draft of the answer.
        question_mask: whether it is of the question.
        shift: by how much lower its position is, tokens in front of it having been dropped.
        next_shift: the shift of tokens that follow, (B, 1).
        rows: the row of each image, (M,).
        counts: how many tokens each image has.
        line: of an image token, which row of the image's grid it is in, and of text that ends such a
            row which one, counted over the prompt; of a video's token which frame, and of the frame's
            time stamp and markers; -1 for other text.
        sizes: as how many tokens attention counts each one, in the first layer and in the others,
            (2, B, n); None where all count as one.
    """

    valid: Tensor
    image: Tensor
    index: Tensor
    column: Tensor
    prompt_mask: Tensor
    question_mask: Tensor
    shift: Tensor
    next_shift: Tensor
    rows: Tensor
    counts: list[int]
    line: Tensor
    sizes: Tensor | None = None

    @classmethod
    def of(
        cls,
        ordinal: Tensor,
        valid: Tensor,
        counts: Sequence[int],
        drafts: int = 0,
        line: Tensor | None = None,
    ) -> Self:
        """Returns the layout of a full input.

        Args:
            ordinal: the image of each placeholder, -1 for text, (B, L).
            valid: tokens that are no padding, (B, L); a placeholder outside it is no token.
            counts: placeholders of each image, in row order.
            drafts: how many of the last tokens are no part of the prompt.
            line: of tokens, and of text that goes with the last one of them, which row of an image
                or
                frame of a video they are of; -1 elsewhere, (B, L).
        """
        index = torch.zeros_like(ordinal)
        line = torch.full_like(ordinal, -1) if line is None else torch.where(valid, line, -1)
        if counts:
            # count each image's placeholders from 0
            index[ordinal >= 0] = torch.cat([*map(torch.arange, counts)])
        image = torch.where(valid, ordinal, -1)
        column = torch.arange(ordinal.shape[1]).expand(len(ordinal), -1)
        prompt = valid & (column < ordinal.shape[1] - drafts)
        return cls(
            valid,
            image,
            index,
            column,
            prompt,
            question_mask((image >= 0) | (line >= 0), prompt),
            torch.zeros_like(ordinal),
            torch.zeros(len(ordinal), 1, dtype=torch.long),
            image_rows(ordinal, len(counts)),
            torch.bincount(image[image >= 0], minlength=len(counts)).tolist(),
            line,
        )

    def images(self) -> list[Tensor]:
        """Returns the columns (n_i,) of each image's tokens, in the row that `rows` names."""
        return image_columns(self.image, self.counts)

    def indices(self) -> list[Tensor]:
        """Returns the indices (n_i,) of each image's tokens among its placeholders."""
        return list(self.index[self.image >= 0].split(self.counts))

    def keep(self, keep: Tensor, right_padded: bool, contiguous: bool) -> tuple[Self, Tensor]:
        """Returns the layout of the tokens that stay, and their columns here, (B, n').

        Args:
            keep: which tokens stay, (B, n).
            right_padded: whether padding stands on the right.
            contiguous: whether positions are renumbered without gaps.
        """
        column, valid = compact(keep, right_padded)
        # a kept token's running count of dropped ones is that of the tokens in front of it
        dropped = (self.valid & ~keep) & contiguous
        shift = self.shift + dropped.cumsum(1)
        image = torch.where(valid, self.image.gather(1, column), -1)
        return replace(
            self,
            valid=valid,
            image=image,
            index=self.index.gather(1, column),
            column=self.column.gather(1, column),
            prompt_mask=self.prompt_mask.gather(1, column) & valid,
            question_mask=self.question_mask.gather(1, column) & valid,
            shift=shift.gather(1, column),
            next_shift=self.next_shift + dropped.sum(1, keepdim=True),
            counts=torch.bincount(image[image >= 0], minlength=len(self.counts)).tolist(),
            sizes=None if self.sizes is None else self.sizes.gather(2, column.expand(2, -1, -1)),
            line=self.line.gather(1, column),
        ), column

    def without_empty_rows(self, keep: Tensor) -> Tensor:
        """Returns `keep` (B, n) without the text of rows, or frames, of which no token stays."""
        text = (self.image < 0) & (self.line >= 0)
        if not bool(text.any()):
            return keep
        shape, shown = (
            (len(self.line), int(self.line.max()) + 1),
            (self.image >= 0) & (self.line >= 0),
        )
        # which lines have image tokens, before and after the cut
        before, after = (
            torch.zeros(shape, dtype=torch.bool).scatter_reduce_(
                1, self.line.clamp(min=0), mask, "amax"
            )
            for mask in (shown, shown & keep)
        )
        empty = (before & ~after).gather(1, self.line.clamp(min=0))
        return keep & ~(text & empty)

    def sized(self, sizes: Sequence[Tensor]) -> Self:
        """Returns the layout with the size of each image's tokens (k,).

        The first layer counts all tokens of an image as their mean.
        """
        table = torch.ones(2, *self.valid.shape)
        for row, columns, image_sizes in zip(self.rows, self.images(), sizes, strict=True):
            if len(columns):
                table[0, row, columns], table[1, row, columns] = image_sizes.mean(), image_sizes
        return replace(self, sizes=table)


def image_seeds(input_ids: Tensor, layout: TokenLayout) -> list[int]:
    """Returns a number for each image that its prompt's question and the number of images behind it
    in the prompt decide: not padding, other rows, or what a cache holds.

    Args:
        input_ids: (B, L), on the host.
        layout: of the same tokens.
    """
    questions = [
        zlib.crc32(ids[mask].numpy().tobytes())
        for ids, mask in zip(input_ids, layout.question_mask, strict=True)
    ]
    rows = layout.rows.tolist()
    behind = [rows[image + 1 :].count(row) for image, row in enumerate(rows)]
    return [
        zlib.crc32(bytes([number % 256]), questions[row])
        for row, number in zip(rows, behind, strict=True)
    ]
