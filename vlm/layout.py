"""Where the images of a prompt are, and which of them can be handled together."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Self

import torch
from torch import Tensor

from vlm_prune.vlm.common.errors import InputError


def alike(keys: Sequence[Hashable]) -> list[list[int]]:
    """Indices of equal keys, in order of first appearance: images that share a tensor."""
    groups: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    return list(groups.values())


def image_ordinals(is_image: Tensor, counts: Sequence[int]) -> Tensor:
    """For each prompt position the index of the image it belongs to, -1 for text; (B, L).

    Images come in row order; `counts` says how many placeholders each has.

    Raises:
        InputError: when the placeholders do not fit the images.
    """
    ordinal = torch.full_like(is_image, -1, dtype=torch.long)
    if not counts:
        return ordinal
    found = int(is_image.sum())
    if found != sum(counts) or min(counts) == 0:
        raise InputError(f"{found} image placeholders do not fit {len(counts)} images")
    sizes = torch.tensor(counts, device=is_image.device)
    ordinal[is_image] = torch.arange(len(counts), device=is_image.device).repeat_interleave(sizes)
    return ordinal


def image_places(ordinal: Tensor, counts: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """Row (M,) and columns (n_i,) of each image's tokens, given (B, L) ordinals."""
    rows, columns = (ordinal >= 0).nonzero(as_tuple=True)
    starts = torch.tensor([0, *counts[:-1]] if counts else [], dtype=torch.long).cumsum(0)
    return rows[starts.to(rows.device)], list(columns.split(list(counts)))


def image_runs(is_image: Tensor) -> list[tuple[int, int, int]]:
    """Row, first column and length of every unbroken run of placeholders, in row order."""
    runs = []
    for row, line in enumerate(is_image.tolist()):
        column = 0
        for image, run in groupby(line):
            length = len(list(run))
            runs += [(row, column, length)] if image else []
            column += length
    return runs


def repeated(counts: Sequence[int], is_image: Tensor) -> list[int]:
    """Indices of images, repeated as beam search repeats a prompt's rows with their images.

    `counts` says how many placeholders each has; `is_image` (B, L) is the repeated prompt's.
    """
    totals = is_image.sum(1).tolist()
    beams = max(1, sum(totals) // max(1, sum(counts)))
    out, image = [], 0
    for total in totals[::beams]:
        row = []
        while total > 0:
            row.append(image)
            total -= counts[image]
            image += 1
        out += row * beams
    return out


def question_places(is_image: Tensor, valid: Tensor) -> Tensor:
    """The text after the last image of each row that has one; (B, L) masks."""
    after = is_image.flip(1).cumsum(1).flip(1) == 0
    return after & valid.bool() & is_image.any(1, keepdim=True)


@dataclass(frozen=True)
class Standing:
    """Where the tokens of a prompt, or of what a cut left of it, stand; shapes (B, L), on the host.

    Args:
        valid: whether it is a token, or padding.
        ordinal: the image it belongs to, -1 for text and padding.
        place: of an image token, among those that its image had at first.
        column: where it stood in the full prompt.
        asked: whether it is of the question.
        left: how many tokens each image has.
    """

    valid: Tensor
    ordinal: Tensor
    place: Tensor
    column: Tensor
    asked: Tensor
    left: list[int]

    @classmethod
    def of(cls, is_image: Tensor, valid: Tensor, kept: Sequence[Tensor]) -> Self:
        """A prompt's, of whose images the places `kept` are there; masks (B, L).

        Raises:
            InputError: when the placeholders do not fit the images.
        """
        left, every = [len(places) for places in kept], torch.arange(is_image.shape[1])
        ordinal, place = image_ordinals(is_image, left), torch.zeros_like(valid, dtype=torch.long)
        place[ordinal >= 0] = torch.cat([every[:0], *kept])
        column = every.expand(len(is_image), -1)
        return cls(valid, ordinal, place, column, question_places(is_image, valid), left)

    def images(self) -> tuple[Tensor, list[Tensor]]:
        """Row (M,) and places in it (n_i,) of each image's tokens."""
        return image_places(self.ordinal, self.left)

    def taken(self, index: Tensor, valid: Tensor, left: list[int]) -> Self:
        """Of the tokens at `index` (B, L'), where they are `valid`."""
        ordinal, place, column, asked = (
            tensor.gather(1, index)
            for tensor in (self.ordinal, self.place, self.column, self.asked)
        )
        return type(self)(
            valid, torch.where(valid, ordinal, -1), place, column, asked & valid, left
        )
