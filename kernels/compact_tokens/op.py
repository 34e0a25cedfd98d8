"""Moving kept tokens together, dispatched."""

from torch import Tensor

from vlm_prune.kernels.dispatch import implementation


def compact_tokens(
    keep: Tensor, *tensors: Tensor, right_padded: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """Gathers the kept tokens of a ragged batch, for all tensors in one launch.

    Shapes: keep (B, L), each tensor (B, L, ...) -> valid (B, L') bool and each tensor as (B, L',
    ...), with L' the longest row. Shorter rows are padded with zeros.

    Args:
        keep: bool, which tokens stay.
        tensors: what belongs to the tokens, such as hidden states, positions, cosines and sines.
        right_padded: whether padding stands on the right instead of the left.
    """
    moved: tuple[Tensor, list[Tensor]] = implementation("compact_tokens", keep).compact_tokens(
        keep, *tensors, right_padded=right_padded
    )
    return moved
