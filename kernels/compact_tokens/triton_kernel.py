"""Moving kept tokens together: one program per row of the output finds and copies its token."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _copy(source, target, stride, width, filled, BLOCK: tl.constexpr):
    """Copies a row of `width` numbers that are `stride` apart, or zeros unless `filled`.

    Args:
        source, target: pointers to the rows.
        stride: of the source; the target's is 1.
        width: numbers of a row.
        filled: whether there is a token.
    """
    # empty slots read nothing and are written as zeros
    readable = tl.where(filled, width, 0)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        values = tl.load(source + columns * stride, mask=columns < readable, other=0)
        tl.store(target + columns, values, mask=columns < width)


@triton.jit
def _compact_kernel(
    keep, counts, valid, sources, targets, strides, widths, tokens, length,
    RIGHT: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copies one kept token of each tensor to its slot of the output, or zeros to an empty slot.

    Programs: (slots of the output, B). The token of rank r stands where the running count of kept
    tokens first reaches r + 1.

    Args:
        keep: (B, L) int8.
        counts: kept tokens of each row, (B,).
        valid: output, which slots are filled, (B, L').
        sources, targets: tensors (B, L, w) and (B, L', w), pointers of as many as there are.
        strides, widths: of each source, and its w.
        tokens, length: L and L'.
        RIGHT: whether empty slots come last.
    """
    slot, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    # the rank of the token that belongs in this slot; empty slots come first or last
    count = tl.load(counts + batch)
    rank = slot if RIGHT else slot - (length - count)
    filled = (rank >= 0) & (rank < count)
    # the running count reaches rank + 1 behind as many tokens as have less
    columns = tl.arange(0, BLOCK_L)
    kept = tl.load(keep + batch * tokens + columns, mask=columns < tokens, other=0)
    running = tl.cumsum(kept.to(tl.int32), 0)
    source = tl.sum(((running <= rank) & (columns < tokens)).to(tl.int32), 0)
    tl.store(valid + batch * length + slot, filled)
    # the same move for each tensor, unrolled when it is compiled
    for i in tl.static_range(len(sources)):
        _copy(
            sources[i] + batch * strides[i][0] + source * strides[i][1],
            targets[i] + (batch * length + slot) * widths[i],
            strides[i][2], widths[i], filled, BLOCK,
        )  # fmt: skip


def compact_tokens(
    keep: Tensor, *tensors: Tensor, right_padded: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """Returns what `op.compact_tokens` describes, in one launch."""
    batch, tokens = keep.shape
    counts = keep.sum(1)
    length = int(counts.max()) if batch else 0
    valid = torch.empty(batch, length, dtype=torch.bool, device=keep.device)
    moved = [tensor.new_empty(batch, length, *tensor.shape[2:]) for tensor in tensors]
    if length == 0:
        return valid, moved
    # (B, L, ...) -> (B, L, w); tensors (B, L) get w = 1
    rows = [_bytes_as_numbers(tensor).flatten(2) for tensor in (t.unsqueeze(-1) for t in tensors)]
    _compact_kernel[(length, batch)](
        keep.to(torch.int8).contiguous(), counts, _bytes_as_numbers(valid),
        tuple(rows), tuple(_bytes_as_numbers(target) for target in moved),
        tuple(row.stride() for row in rows), tuple(row.shape[2] for row in rows), tokens, length,
        RIGHT=right_padded, BLOCK_L=triton.next_power_of_2(tokens), BLOCK=1024,
    )  # fmt: skip
    return valid, moved


def _bytes_as_numbers(tensor: Tensor) -> Tensor:
    """Returns booleans as int8 in the same memory, and other tensors as they are."""
    return tensor.view(torch.int8) if tensor.dtype == torch.bool else tensor
