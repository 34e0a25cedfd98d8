"""Sequential selection of tokens, dispatched."""

from typing import get_args

import torch
from torch import Tensor

from vlm_prune.kernels.dispatch import implementation
from vlm_prune.kernels.greedy_select.reference import SelectionRule


def greedy_select(
    similarity: Tensor, scores: Tensor, k: int, rule: SelectionRule, valid: Tensor | None = None
) -> Tensor:
    """Chooses `k` tokens of each image one after the other, all steps in one launch.

    Shapes: similarity (M, N, N), symmetric, scores (M, N), valid (M, N) -> indices (M, k) in the
    order chosen; -1 where an image has fewer than k valid tokens. Ties go to the lowest index.

    Args:
        similarity: for `coverage` (M, N, R) instead: how well each token covers each of R things.
        scores: for `coverage` weights that are not negative.
        k: how many are chosen.
        rule: `diverse` takes the largest score x (1 - largest similarity to a chosen token), first
            the best score (https://arxiv.org/abs/2509.24837); `farthest` takes the largest
            1 - largest similarity, first the best score (https://arxiv.org/abs/2503.02175); `dpp`
            is greedy MAP of the determinant of diag(scores) similarity diag(scores)
            (https://arxiv.org/abs/1709.05135), each step one row of an incremental Cholesky factor.
            Once the rank is spent every gain is zero and the lowest indices follow; `coverage`
            takes the largest score x what it adds to the sum over R of the best cover so far, which
            starts at 0: greedy maximum coverage (https://arxiv.org/abs/2508.18264), weighted
            (https://arxiv.org/abs/2510.24214).
        valid: tokens that may be chosen; all by default.

    Raises:
        ValueError: for an unknown rule.
    """
    if rule not in get_args(SelectionRule):
        raise ValueError(f"unknown rule {rule!r}; known: {', '.join(get_args(SelectionRule))}")
    work = torch.promote_types(similarity.dtype, torch.float32)
    module = implementation("greedy_select", similarity)
    chosen: Tensor = module.greedy_select(similarity.to(work), scores.to(work), k, rule, valid)
    return chosen
