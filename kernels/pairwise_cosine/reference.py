"""Cosine of every pair of tokens, in plain PyTorch."""

from torch import Tensor
from torch.nn.functional import normalize

from vlm_prune.kernels.visible import at_least_fp32


def pairwise_cosine(one: Tensor, other: Tensor) -> Tensor:
    """Returns what `op.pairwise_cosine` describes."""
    left = normalize(at_least_fp32(one), dim=-1)
    right = left if other is one else normalize(at_least_fp32(other), dim=-1)
    return left @ right.transpose(-1, -2)
