"""Image and video tokens as plain tensors: what pruners see, what they give back, index maths."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from zlib import crc32

import torch
from torch import Tensor

from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.orders import SharedOrders
from vlm_prune.vlm.projector import Projector


def as_is(values: Tensor) -> Tensor:
    """Returns the values unchanged: the tower's patches are the image's tokens."""
    return values


def no_patches() -> Tensor:
    """Raises `InputError`, as the pixels behind these tokens are not known."""
    raise InputError(
        "this method compares pixels, and those of each token are not known here; "
        "give one that reads features, such as divprune"
    )


@dataclass(frozen=True)
class VisionTokens:
    """The tokens of M images of N tokens each, after the vision tower; or of M videos, whose N
    tokens are those of their frames, one frame after the other.

    Args:
        features: what the projector's first layer reads, (M, N, d_v).
        projected: the projector's output, (M, N, d_l).
        grids: rows and columns of each view of the image, whose tokens follow one another: one
            for most models, an overview and tiles for others.
        seeds: one number per image that depends on its pixels alone, so that random draws are
            the same in any batch.
        projector: the map between the two, a `Projector` where it has two layers.
        query_key: queries and keys of the tower layer whose output is `features`, with the CLS
            token in front where there is one, (M T, H, S, d) each; T tiles per image.
        question: for each image the embeddings (T, d_l) of the text that follows the last image
            of its prompt; empty before a prompt is known.
        has_cls: whether the first of the S tokens is a CLS token.
        pool: what the tower says about its patches, (M T, S, c) without the CLS token, for image
            tokens, (M, N, c): the average where a token is made of several patches. Of videos it takes any
            number of frames and leaves them apart, (F, S, c) -> (F, N / T, c); `pooled` joins them.
        available: placeholders of each image in the prompt: N, and newlines where there are some.
        frames: T where these are videos, each of T frames of N / T tokens; 0 for images. Families
            that encode several frames together count them as one.
        patches: the pixels behind each token as the tower reads them, (M, N, p).
        frames_query_key: `query_key` of some of the M T frames alone, where they need not all be computed.
        orders: those found so far of just these tokens, where several budgets of a method are measured.
    """

    features: Tensor
    projected: Tensor
    grids: tuple[tuple[int, int], ...]
    seeds: tuple[int, ...]
    projector: Projector | Callable[[Tensor], Tensor]
    query_key: Callable[[], tuple[Tensor, Tensor]] = field(repr=False)
    question: Callable[[], tuple[Tensor, ...]] = field(default=tuple, repr=False)
    has_cls: bool = True
    pool: Callable[[Tensor], Tensor] = field(default=as_is, repr=False)
    available: int = -1
    frames: int = 0
    patches: Callable[[], Tensor] = field(default=no_patches, repr=False)
    frames_query_key: Callable[[list[int]], tuple[Tensor, Tensor]] | None = field(
        default=None, repr=False
    )
    orders: SharedOrders | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.available < 0:
            object.__setattr__(self, "available", self.projected.shape[1])

    def of(self, image: int, chosen: Tensor) -> "VisionTokens":
        """Returns some tokens of one image, `chosen` (N,) by a mask; grids
        stay those of the whole image.
        """

        def query_key() -> tuple[Tensor, Tensor]:
            query, key = self.query_key()
            tiles = len(query) // len(self.projected)
            # the image's tiles follow one another
            rows = slice(image * tiles, (image + 1) * tiles)
            return query[rows], key[rows]

        # part of a video has no frames of equal size
        whole = bool(self.frames and chosen.all())
        return replace(
            self,
            features=self.features[image : image + 1, chosen],
            projected=self.projected[image : image + 1, chosen],
            seeds=self.seeds[image : image + 1],
            query_key=query_key,
            question=lambda: self.question()[image : image + 1],
            pool=self.pool if whole else lambda values: self.pooled(values)[:, chosen],
            frames=self.frames if whole else 0,
            patches=lambda: self.patches()[image : image + 1, chosen.to(self.patches().device)],
            frames_query_key=None,
            orders=None,
        )

    def in_frames(self, chosen: Sequence[int] | None = None) -> "VisionTokens":
        """Returns the frames of M videos as images, in the order video by video; (M F, N / T, ...).

        Args:
            chosen: which F of the frames, ascending; all T unless given.
        """
        videos, frames = len(self.projected), self.frames
        frame_numbers = list(range(frames)) if chosen is None else list(chosen)
        # frames of all videos are numbered one after the other
        at = [video * frames + frame for video in range(videos) for frame in frame_numbers]

        def split(values: Tensor) -> Tensor:
            # (M, N, ...) -> (M, T, N / T, ...) -> (M F, N / T, ...); no copy of frames in a row
            parts: Tensor = values.unflatten(1, (frames, -1))
            return parts[:, rows_at(frame_numbers)].flatten(0, 1)

        def query_key() -> tuple[Tensor, Tensor]:
            return self.query_key_of(at)

        return replace(
            self,
            features=split(self.features),
            projected=split(self.projected),
            grids=self.grids[: len(self.grids) // frames],
            seeds=tuple(
                crc32(f"{seed} {frame}".encode()) for seed in self.seeds for frame in frame_numbers
            ),
            query_key=query_key,
            question=lambda: tuple(text for text in self.question() for _ in frame_numbers),
            available=self.projected.shape[1] // frames,
            frames=0,
            patches=lambda: split(self.patches()),
            frames_query_key=None,
            orders=None,
        )

    def query_key_of(self, frames: list[int]) -> tuple[Tensor, Tensor]:
        """Returns `query_key`, (F, H, S, d), of F of the M T frames of
        videos, numbered video by video.
        """
        if self.frames_query_key is not None:
            return self.frames_query_key(frames)
        query, key = self.query_key()
        rows = rows_at(frames)
        return query[rows], key[rows]

    def pooled(self, values: Tensor) -> Tensor:
        """Returns what the tower says about patches, (M T, S, c), for the tokens of M images or
        videos, (M, N, c).
        """
        parts = self.pool(values)
        if not self.frames:
            return parts
        # (M T, N / T, c) -> (M, T, N / T, c) -> (M, N, c)
        videos: Tensor = parts.unflatten(0, (-1, self.frames))
        return videos.flatten(1, 2)

    def keys(self) -> Tensor:
        """Returns the tower's keys of the N tokens, heads side by side, (M, N, H d)."""
        # (M T, H, S, d) -> (M T, S, H d), without the CLS token
        return self.pooled(self.query_key()[1].transpose(1, 2).flatten(2)[:, int(self.has_cls) :])

    @property
    def grid(self) -> tuple[int, int]:
        """Returns rows and columns, for methods that know one grid per image.

        Raises:
            InputError: when the tokens are those of several views.
        """
        if len(self.grids) > 1:
            raise InputError(
                f"this method needs images of one grid of tokens, and these have {len(self.grids)}"
            )
        return self.grids[0]


def rows_at(numbers: Sequence[int]) -> slice | list[int]:
    """Returns what takes rows of a tensor, without a copy where they follow one another."""
    first, count = min(numbers, default=0), len(numbers)
    if [*numbers] == [*range(first, first + count)]:
        return slice(first, first + count)
    return [*numbers]


@dataclass(frozen=True)
class AttentionRows:
    """What the causal attention of T tokens of a prompt in one decoder layer is made of.

    Args:
        query: after rotation, (M, H, T, d).
        key: of all L tokens, after rotation, (M, G, L, d).
        columns: where each query stands among the keys, -1 for padding, (M, T).
        key_valid: which keys are real, (M, L).
        image: where the image tokens stand among the keys, (M, n).
        scale: factor of the products.
        window: how many positions a query sees, its own among them; None for all.
    """

    query: Tensor
    key: Tensor
    columns: Tensor
    key_valid: Tensor
    image: Tensor
    scale: float
    window: int | None = None

    @property
    def key_positions(self) -> Tensor:
        """Returns the token indices of the keys, -1 for padding, (M, L)."""
        positions = torch.arange(self.key.shape[2], device=self.key.device)
        return torch.where(self.key_valid, positions, -1)


@dataclass(frozen=True)
class DecoderTokens:
    """The n tokens that M images still have where a method cuts inside the language model.

    T is the longest question, the text after the last image of a prompt; shorter ones are padded
    on the left.

    Args:
        features: hidden states of the image tokens, (M, n, D).
        question: hidden states of the question, (M, T, D).
        question_mask: which tokens of the question are real, (M, T).
        query_mask: tokens of the question whose attention the method reads, (M, T).
        question_rows: queries of the question's tokens in the slice, and all keys.
        prompt_rows: queries of all tokens of the prompt, and all keys.
        keys: keys before rotation, heads side by side, of image tokens (M, n, d) and question
            (M, T, d).
        final_norm: the model's norm of its last hidden states, (..., D) -> (..., D).
        seeds: one number per image that depends on the question and on how many images stand
            behind it, so that random draws are the same in any batch.
    """

    features: Tensor
    question: Tensor
    question_mask: Tensor
    query_mask: Tensor
    question_rows: Callable[[slice], AttentionRows] = field(repr=False)
    prompt_rows: Callable[[], AttentionRows] = field(repr=False)
    keys: Callable[[], tuple[Tensor, Tensor]] = field(repr=False)
    final_norm: Callable[[Tensor], Tensor] = field(default=as_is, repr=False)
    seeds: tuple[int, ...] = ()


@dataclass(frozen=True)
class Kept:
    """What a pruner keeps of each image: indices (k,), ascending, and their features (k, d).

    Indices count the image's tokens as the pruner got them. `sizes` (k,) says how many of them each
    kept one stands for, where attention is to count it as so many; None where it is not.
    """

    indices: list[Tensor]
    features: list[Tensor]
    sizes: list[Tensor] | None = None

    @classmethod
    def at(cls, features: Tensor, indices: Tensor) -> "Kept":
        """Keeps tokens of (M, N, d) as they are; `indices` is (M, k), ascending."""
        return cls(list(indices), list(take(features, indices)))


def take(tokens: Tensor, indices: Tensor) -> Tensor:
    """Returns the tokens of each row at its indices; (B, N, d), (B, k) -> (B, k, d)."""
    return tokens.gather(1, indices[..., None].expand(-1, -1, tokens.shape[-1]))


def ranked(scores: Tensor, k: int) -> Tensor:
    """Returns the indices of the `k` largest scores of each row, the largest first;
    ties go to the lowest index.

    Shapes: scores (..., N) -> (..., k).
    """
    # a stable sort gives ties to the lowest index
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def top(scores: Tensor, k: int) -> Tensor:
    """Returns the indices of the `k` largest scores of each row, ascending;
    ties go to the lowest index.

    Shapes: scores (..., N) -> (..., k).
    """
    return ranked(scores, k).sort(dim=-1).values


def compact(keep: Tensor, right_padded: bool = False) -> tuple[Tensor, Tensor]:
    """Returns indices for `gather` that close the gaps of a boolean mask, for what
    is indexed rather than moved.

    Tensors that move themselves are the business of `kernels.compact_tokens`, one fused launch.

    Shapes: keep (B, L) -> index (B, L'), valid (B, L') with L' the longest row; shorter rows are
    padded on the left (or right), where `valid` is False and `index` points anywhere.
    """
    length = int(keep.sum(1).max()) if keep.numel() else 0
    # a stable sort moves kept tokens to one side, in their order
    order = keep.to(torch.int8).argsort(dim=1, stable=True, descending=right_padded)
    index = order[:, :length] if right_padded else order[:, keep.shape[1] - length :]
    return index, keep.gather(1, index)


def is_right_padded(mask: Tensor) -> bool:
    """Returns whether any row of a (B, L) validity mask ends in padding."""
    return bool((~mask[:, -1].bool()).any())
