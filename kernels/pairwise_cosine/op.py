"""Cosine of every pair of tokens, dispatched."""

from torch import Tensor

from vlm_prune.kernels.dispatch import implementation


def pairwise_cosine(one: Tensor, other: Tensor) -> Tensor:
    """Returns the cosine of every token of `one` with every token of `other`, image by image.

    Shapes: (M, N, d), (M, K, d) -> (M, N, K), in at least fp32; zero for a token of zeros.
    Products of half-precision features are exact and summed in fp32.
    """
    module = implementation("pairwise_cosine", one)
    cosine: Tensor = module.pairwise_cosine(one, other)
    return cosine
