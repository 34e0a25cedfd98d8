"""Moving kept tokens together, in plain PyTorch."""

from torch import Tensor


def compact_tokens(
    keep: Tensor, *tensors: Tensor, right_padded: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """Returns what `op.compact_tokens` describes, row by row."""
    counts = keep.sum(1).tolist()
    length = max(counts, default=0)
    # shorter rows begin later, unless they are padded on the right
    starts = [0 if right_padded else length - count for count in counts]
    valid = keep.new_zeros(len(keep), length)
    moved = [tensor.new_zeros(len(keep), length, *tensor.shape[2:]) for tensor in tensors]
    for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
        valid[row, start : start + count] = True
        for target, tensor in zip(moved, tensors, strict=True):
            target[row, start : start + count] = tensor[row, keep[row]]
    return valid, moved
