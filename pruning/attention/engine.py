"""Running a method of sparse attention on the calls of a model's layers."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from vlm_prune.pruning.attention.blocks import (
    KeptBlocks,
    body_length,
    local_products,
    tail_products,
)
from vlm_prune.pruning.attention.executors import EXECUTORS, Executor, attend_dense, attend_tail
from vlm_prune.pruning.attention.inputs import AttentionInputs
from vlm_prune.pruning.attention.trace import Computed, SparseTrace
from vlm_prune.vlm.sparse_attention import AttentionCall


def most_products(device: torch.device) -> int:
    """Returns how many products of queries and keys are held at a time: as many as stay in a CPU's cache,
    or keep a GPU busy.
    """
    return 1 << 19 if device.type == "cpu" else 1 << 26


class ReadsInputs(Protocol):
    """What a method says of the inputs that it reads."""

    @property
    def reads_rotation(self) -> bool:
        """Returns whether the method reads the cosines and sines of positions."""

    @property
    def reads_frames(self) -> bool:
        """Returns whether the method reads which image or frame each token is of."""


class ChoosesBlocks(ReadsInputs, Protocol):
    """What the engine asks of a method; its fields are those of `BlockAttention`."""

    minimum: int
    dense_layers: int
    block: int
    tail: int
    executor: Executor

    def select(self, inputs: AttentionInputs) -> KeptBlocks:
        """Returns the blocks that are computed beside what all methods compute."""


@dataclass(frozen=True)
class PromptRow:
    """One row of a call, without its padding.

    Args:
        query: (H, n, d).
        key: (G, n, d).
        value: (G, n, v).
        rotary: cosines and sines of positions, (2, n, r); None unless they are read.
        tail: tokens behind the last image token.
        frames: the image or frame of each token, -1 for text, (n,); None where it is not known.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    rotary: Tensor | None
    tail: int
    frames: Tensor | None = None


def prompt_of(call: AttentionCall, row: int) -> tuple[PromptRow, slice | Tensor]:
    """Returns a row of a call without its padding, and where its tokens are."""
    query, key, value, rotary = call.query[row], call.key[row], call.value[row], None
    if call.rotary is not None:
        rotary = torch.stack([table[row if len(table) > 1 else 0] for table in call.rotary])
    frames = None if call.frames is None else call.frames[row]
    # the row's real tokens, in front of, behind or between its padding
    where: slice | Tensor = slice(None)
    if call.valid is not None:
        where = real_tokens(call.valid[row])
        query, key, value = query[:, where], key[:, where], value[:, where]
        rotary = None if rotary is None else rotary[:, where]
    # where tokens have been dropped, nothing tells which are left
    frames = None if frames is None or len(frames) != key.shape[1] else frames
    return PromptRow(query, key, value, rotary, call.tails[row], frames), where


def by_prompt(
    call: AttentionCall, attend: Callable[[AttentionCall, PromptRow, int], list[Tensor]]
) -> Tensor:
    """Returns the attention of all prompts of a call, (B, n, H, v).

    Prompts run one after the other without their padding, so that none depends on the others.

    Args:
        call: of a layer.
        attend: takes the call, a prompt and its row; returns its attention (H, n, v) in parts of its
            tokens.
    """
    batch, heads, length = call.query.shape[:3]
    shape = (batch, length, heads, call.value.shape[3])
    # what padding attends to does not matter, but must be finite
    output = call.query.new_empty(shape) if call.valid is None else call.query.new_zeros(shape)
    for row in range(batch):
        prompt, where = prompt_of(call, row)
        parts = attend(call, prompt, row)
        if isinstance(where, slice):
            # a slice is written in place; indices, where padding has gaps, in one piece
            targets = output[row, where].split([part.shape[1] for part in parts])
            for target, part in zip(targets, parts, strict=True):
                target.copy_(part.transpose(0, 1))
        else:
            output[row, where] = torch.cat(parts, 1).transpose(0, 1)
    return output


@dataclass
class MethodRun:
    """What computes attention in one block; what a method does not compute is SDPA's.

    Args:
        method: chooses what is computed.
        trace: what was.
    """

    method: ReadsInputs
    trace: SparseTrace = field(default_factory=SparseTrace)

    @property
    def reads_rotation(self) -> bool:
        """Returns whether the method reads the cosines and sines of positions."""
        return self.method.reads_rotation

    @property
    def reads_frames(self) -> bool:
        """Returns whether the method reads which image or frame each token is of."""
        return self.method.reads_frames

    def left_dense(self, reason: str) -> None:
        """Notes that a call of more than one query went to SDPA, and why."""
        self.trace.dense[reason] += 1

    def too_early(self, call: AttentionCall, dense_layers: int, least: int) -> bool:
        """Returns whether a whole call is left to SDPA, and notes why.

        Args:
            call: of a layer.
            dense_layers: first layers that are left to it.
            least: queries of a call that is not.
        """
        first, short = call.layer < dense_layers, call.query.shape[2] < least
        if first or short:
            self.left_dense("first layers" if first else "a short prompt")
        return first or short

    def decode(self, call: AttentionCall) -> Tensor | None:
        """Returns None: SDPA computes the attention of one new token."""
        return None


@dataclass
class BlockRun(MethodRun):
    """Computes blocks that its method chooses."""

    method: ChoosesBlocks

    @torch.no_grad()
    def prefill(self, call: AttentionCall) -> Tensor | None:
        """Returns sparse attention (B, n, H, v) of prompts; None where all of them are SDPA's."""
        method = self.method
        least = max(method.minimum, 2 * method.block + method.tail)
        if self.too_early(call, method.dense_layers, least):
            return None
        return by_prompt(call, self.attend)

    def inputs_of(self, call: AttentionCall, prompt: PromptRow) -> AttentionInputs | None:
        """Returns what the method chooses from in one prompt, the tokens before its tail; None, and a
        note why, where it is too short.
        """
        method, tokens = self.method, prompt.key.shape[1]
        length = body_length(tokens, max(method.tail, prompt.tail), method.block)
        if tokens < method.minimum or length < 2 * method.block:
            self.left_dense("a short prompt")
            return None
        # whole blocks before the tail are the method's, the rest sees everything
        rotary = None if prompt.rotary is None else prompt.rotary[:, :length]
        frames = None if prompt.frames is None else prompt.frames[:length]
        return AttentionInputs(
            prompt.query[:, :length], prompt.key[:, :length], call.scaling, call.layer, tokens,
            rotary, most_products(prompt.query.device), frames,
        )  # fmt: skip

    def attend(self, call: AttentionCall, prompt: PromptRow, row: int) -> list[Tensor]:
        """Returns attention of one prompt, (H, n, v) in parts of its tokens.

        Args:
            call: of the layer.
            prompt: a row of it.
            row: its number.
        """
        method, tokens, scaling = self.method, prompt.key.shape[1], call.scaling
        query, key, value = prompt.query, prompt.key, prompt.value
        inputs = self.inputs_of(call, prompt)
        if inputs is None:
            return [attend_dense(query, key, value, scaling)]
        length = inputs.length
        body = [tensor[:, :length] for tensor in (query, key, value)]
        kept = method.select(inputs).forced(length)
        executor = method.executor
        if executor == "auto":
            single = kept.geometry.columns == 1
            # FlexAttention skips blocks, not single keys
            executor = "gather" if query.device.type == "cpu" or single else "flex"
        if executor == "flex":
            kept = kept.coarse(length)
        before = EXECUTORS[executor](*body, kept, scaling)
        behind = attend_tail(query[:, length:], key, value, scaling)
        self.trace.computed.append(
            Computed(
                call.layer,
                row,
                tokens,
                forced_products(tokens, length, method.block),
                kept.products(length) + tail_products(tokens, length),
            )
        )
        return [before, behind]


def forced_products(tokens: int, length: int, block: int) -> int:
    """Returns the products that all methods compute of a prompt: each block's own and its first one, and
    the tail's.

    Args:
        tokens: of the prompt.
        length: tokens before its tail, whole blocks of them.
        block: tokens of a block.
    """
    # all rows behind the first block see it
    first = (length - block) * block
    return local_products(length, block) + first + tail_products(tokens, length)


def real_tokens(valid: Tensor) -> slice | Tensor:
    """Returns where a row's tokens are that are no padding: a slice, or indices where there are gaps."""
    # without gaps a slice does, which copies nothing
    index: Tensor = valid.nonzero()[:, 0]
    first, last = int(index[0]), int(index[-1])
    return slice(first, last + 1) if last - first + 1 == len(index) else index
