"""What a method of sparse attention is: a dataclass of hyperparameters, applied to a model as a
context manager.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar, Literal, Protocol, get_args

import torch
from torch import Tensor

from vlm_prune.pruning.attention.blocks import Geometry, KeptBlocks, top_blocks
from vlm_prune.pruning.attention.calibration import HeadCalibration
from vlm_prune.pruning.attention.engine import BlockRun
from vlm_prune.pruning.attention.executors import Executor
from vlm_prune.pruning.attention.inputs import AttentionInputs
from vlm_prune.pruning.attention.trace import SparseTrace
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.registry import unknown
from vlm_prune.vlm.families import family_of
from vlm_prune.vlm.sparse_attention import AttentionFunction, check_attention, replaced_attention

SharedBy = Literal["group", "head"]


class AttentionRun(AttentionFunction, Protocol):
    """What computes attention in one block, and says in `trace` what it computed."""

    @property
    def trace(self) -> SparseTrace:
        """Returns what has been computed so far."""


@dataclass(kw_only=True)
class SparseAttention(ABC):
    """Compute part of the products of queries and keys.

    `with method(model) as trace:` does so in every `generate` and forward inside the block, in
    layers of full causal attention, and leaves the model as it was. `trace` says what was computed.
    What is not computed this way runs on SDPA: prompts below `minimum`, tokens behind a cached
    prefix, layers with sliding windows or masks of their own, and training.

    Args:
        density: share that is computed; None for the authors' own rule.
        minimum: tokens of the shortest prompt that is not left to SDPA.
        dense_layers: first decoder layers that are left to SDPA.
        seed: for methods that draw random numbers.

    Raises:
        InputError: if a hyperparameter is out of range.
    """

    density: float | None = 0.25
    minimum: int = 2048
    dense_layers: int = 0
    seed: int = 0

    paper: ClassVar[str] = ""
    reads_rotation: ClassVar[bool] = False
    """Whether it reads the cosines and sines of the tokens' positions."""
    reads_frames: ClassVar[bool] = False
    """Whether it reads which image or frame tokens are of."""
    from_zero: ClassVar[frozenset[str]] = frozenset({"minimum", "dense_layers", "seed"})
    """Whole numbers that may be 0."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), int(field.name not in self.from_zero)
            if field.type is int and (type(value) is not int or value < least):
                raise InputError(f"{field.name} {value!r} is no whole number from {least} on")
            if field.type is float and not (type(value) in (int, float) and 0 < value < math.inf):
                raise InputError(f"{field.name} {value!r} is no finite number above 0")
        if self.density is not None and not (
            type(self.density) in (int, float) and 0 < self.density <= 1
        ):
            raise InputError(f"density {self.density!r} is no share; give one above 0, at most 1")

    @contextmanager
    def __call__(self, model: Any) -> Iterator[SparseTrace]:
        """Computes attention with this method inside a `with` block, which gives
        the trace of what was computed.
        """
        self.admit(model)
        run = self.run()
        with replaced_attention(model, run):
            yield run.trace

    def admit(self, model: Any) -> None:
        """Raises `InputError` when this method does not go with the model."""
        check_attention(family_of(model))

    @abstractmethod
    def run(self) -> AttentionRun:
        """Returns the run that computes attention in one `with` block."""


@dataclass(kw_only=True)
class Calibrated(SparseAttention):
    """Compute attention with what was found for the heads of one model.

    Args:
        calibration: file that `vlm-prune calibrate` wrote for the model; none where it is empty.
    """

    calibration: str = ""

    registered: ClassVar[str]
    """The method's registered name."""

    @cached_property
    def found(self) -> HeadCalibration | None:
        """Returns what the file holds; None without one.

        Raises:
            InputError: if it cannot be read, or is for another method.
        """
        if not self.calibration:
            return None
        return HeadCalibration.read(self.calibration, self.registered)

    def admit(self, model: Any) -> None:
        """Raises `InputError` when this method does not go with the model, or the file is for another
        model.
        """
        super().admit(model)
        if self.found is not None:
            self.found.check(model, self.calibration)


@dataclass(kw_only=True)
class BlockAttention(SparseAttention):
    """Compute, in a prefill, chosen blocks of the products of queries and keys.

    All methods compute the same parts whatever they choose: the first block of keys, each query's
    own block, and the rows from the last image token on, at least `tail` of them.

    A block's mask is chosen with help of its last rows, so a prompt in chunks, or behind a cached
    prefix, would get another mask than in one pass.

    Args:
        density: share of the products of queries and keys before each query that is computed,
            what all methods compute included; None for the authors' own rule.
        block: tokens of a block of queries or keys.
        share: whether all heads over one key head compute the same blocks, as pays on a CPU.
        executor: what computes the blocks: `reference` holds all products, `gather` copies the
            kept keys together, `flex` is compiled FlexAttention; `auto` is `gather` on a CPU and
            where single columns are kept, else `flex`.
        tail: rows at a prompt's end that see all keys, at least.
    """

    block: int = 128
    share: SharedBy = "group"
    executor: Executor = "auto"
    tail: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (("share", get_args(SharedBy)), ("executor", get_args(Executor))):
            if getattr(self, name) not in allowed:
                raise InputError(unknown(name, str(getattr(self, name)), allowed))
        if self.executor == "flex" and (self.block < 16 or self.block & (self.block - 1)):
            raise InputError(
                f"FlexAttention takes blocks of 16, 32, 64 or another power of two, not {self.block}"
            )
        if self.density is None and type(self).choose is BlockAttention.choose:
            raise InputError(
                f"{type(self).__name__} has no rule but a density; give one, such as 0.25"
            )

    def run(self) -> BlockRun:
        """Returns the run that computes attention in one `with` block."""
        return BlockRun(self)

    def geometry(self, inputs: AttentionInputs) -> Geometry:
        """Returns the shapes of query and key blocks that the method chooses from."""
        return Geometry(self.block, self.block, self.block, self.block)

    @abstractmethod
    def scores(self, inputs: AttentionInputs) -> Tensor:
        """Scores each pair of blocks, (R, query blocks, key blocks), of R = 1,
        G or H masks; higher is kept.
        """

    def choose(self, inputs: AttentionInputs) -> Tensor:
        """Returns what the authors' own rule keeps,
        (R, query blocks, key blocks), of R = 1, G or H masks.
        """
        raise NotImplementedError

    def at_density(self, inputs: AttentionInputs, blocks: float) -> Tensor:
        """Returns a mask (R, query blocks, key blocks) that keeps the same share of
        the blocks before each query block.

        Args:
            inputs: queries and keys.
            blocks: that may be kept beside what all methods compute, counted once for each query.
        """
        return top_blocks(self.scores(inputs), self.geometry(inputs), blocks)

    def select(self, inputs: AttentionInputs) -> KeptBlocks:
        """Returns the blocks that are computed for these queries and keys,
        beside what all methods compute.
        """
        geometry, length = self.geometry(inputs), inputs.length
        if self.density is None:
            keep = self.choose(inputs)
        else:
            # what the density leaves beside the parts that all methods compute
            budget = geometry.open_blocks(self.density, inputs.tokens, length)
            keep = self.at_density(inputs, budget)
        if self.share == "group" and len(keep) > inputs.groups:
            # (H, ...) -> (G, ...): heads that share keys compute what any of them keeps
            keep = keep.unflatten(0, (inputs.groups, -1)).any(1)
        return KeptBlocks(keep & geometry.candidates(length, keep.device), geometry)

    def shared(self, scores: Tensor, inputs: AttentionInputs) -> Tensor:
        """Returns what heads that share a mask expect together: of scores (H, ...) the mean of each
        group, (G, ...), or all of them.
        """
        if self.share == "head":
            return scores
        expected: Tensor = scores.unflatten(0, (inputs.groups, -1)).mean(1)
        return expected


@torch.no_grad()
def kept_mass(weights: Tensor, share: float) -> Tensor:
    """Returns the largest weights of each row that sum up to a share of it, (..., n) of booleans.

    Args:
        weights: (..., n), not negative.
        share: of each row's sum.
    """
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    # an entry stays while the larger ones before it have not reached the share
    before = ordered.cumsum(-1) - ordered
    wanted = before < share * ordered.sum(-1, keepdim=True)
    return torch.zeros_like(wanted).scatter(-1, order, wanted)
