"""Sequential selection: one program per image runs all its steps."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlm_prune.kernels.greedy_select.reference import SPENT, SelectionRule


@triton.jit
def _select_kernel(
    similarity, scores, valid, factor, chosen, by_image, by_row, by_column, k, tokens,
    RULE: tl.constexpr, SPENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Chooses k tokens of one image by `diverse`, `farthest` or `dpp`, one after the other.

    Programs: (M,).

    Args:
        similarity: (M, N, N), read by `by_image`, `by_row` and `by_column`.
        scores, valid: (M, N), `valid` in int8 or None.
        factor: rows of a Cholesky factor, (M, k, N) in fp32; None unless the rule is `dpp`.
        chosen: output, (M, k); -1 where no token is left.
        k, tokens: k and N.
        SPENT: share of the largest variance below which one is rounding.
    """
    image = tl.program_id(0).to(tl.int64)
    similarity += image * by_image
    if RULE == "dpp":
        factor += image * k * tokens
    # all N tokens of the image are in one tile
    columns = tl.arange(0, BLOCK)
    inside = columns < tokens
    score = tl.load(scores + image * tokens + columns, mask=inside, other=0.0)
    free = inside.to(tl.int8)
    if valid is not None:
        free = tl.load(valid + image * tokens + columns, mask=inside, other=0)
    # each step takes the largest gain among free tokens; `nearest` and `residual` carry it on
    nearest = tl.zeros([BLOCK], tl.float32)
    # a diagonal entry is one row and one column further than the last
    diagonal = tl.load(similarity + columns * (by_row + by_column), mask=inside, other=0.0)
    residual = score * score * diagonal
    spent = SPENT * tl.max(residual, 0)
    for step in range(k):
        if RULE == "dpp":
            residual = tl.where(residual > spent, residual, 0.0)
            gain = residual
        elif RULE == "diverse":
            gain = tl.where(step == 0, score, score * (1 - nearest))
        else:
            gain = tl.where(step == 0, score, 1 - nearest)
        gain = tl.where(free != 0, gain, float("-inf"))
        best, pick = tl.max(gain, 0, return_indices=True, return_indices_tie_break_left=True)
        tl.store(chosen + image * k + step, tl.where(best > float("-inf"), pick, -1))
        # the token is taken, and all others learn how near it is to them
        free = tl.where(columns == pick, 0, free)
        row = similarity + pick * by_row + columns * by_column
        closest = tl.load(row, mask=inside, other=0.0)
        nearest = tl.where(step == 0, closest, tl.maximum(nearest, closest))
        if RULE == "dpp":
            # one row of an incremental Cholesky factor: what chosen tokens explain is subtracted
            size = tl.maximum(best, 0.0)
            part = tl.load(scores + image * tokens + pick) * score * closest
            past = tl.zeros([BLOCK], tl.float32)
            for earlier in range(step):
                vector = tl.load(factor + earlier * tokens + columns, mask=inside, other=0.0)
                past += tl.load(factor + earlier * tokens + pick) * vector
            part = tl.where(size > 0, (part - past) / tl.sqrt(tl.where(size > 0, size, 1.0)), 0.0)
            tl.store(factor + step * tokens + columns, part, mask=inside)
            tl.debug_barrier()  # the next step reads this row across threads
            residual -= part * part


@triton.jit
def _cover_kernel(
    cover, weights, valid, chosen, by_image, by_row, by_column, k, tokens, targets,
    BLOCK: tl.constexpr, THINGS: tl.constexpr,
):  # fmt: skip
    """Chooses k tokens of one image that cover its targets, one after the other.

    Programs: (M,).

    Args:
        cover: (M, N, T), read by `by_image`, `by_row` and `by_column`.
        weights, valid: (M, N), `valid` in int8 or None.
        chosen: output, (M, k); -1 where no token is left.
        k, tokens, targets: k, N and T.
        THINGS: power of two that holds the targets.
    """
    image = tl.program_id(0).to(tl.int64)
    cover += image * by_image
    rows, columns = tl.arange(0, BLOCK), tl.arange(0, THINGS)
    free = rows < tokens
    if valid is not None:
        free = tl.load(valid + image * tokens + rows, mask=free, other=0) != 0
    # gains only fall while tokens are added, so one computed earlier bounds the present one: the
    # token with the largest is computed anew until it has the largest although it is up to date
    gain = tl.where(free, float("inf"), float("-inf"))
    covered = tl.zeros([THINGS], tl.float32)
    for step in range(k):
        current = tl.where(free, 0, 1)
        best, pick = tl.max(gain, 0, return_indices=True, return_indices_tie_break_left=True)
        while tl.sum(tl.where(rows == pick, current, 0)) == 0:
            row = cover + pick * by_row + columns * by_column
            more = tl.load(row, mask=columns < targets, other=0.0) - covered
            more = tl.sum(tl.maximum(more, 0.0)) * tl.load(weights + image * tokens + pick)
            gain = tl.where(rows == pick, more, gain)
            current = tl.where(rows == pick, 1, current)
            best, pick = tl.max(gain, 0, return_indices=True, return_indices_tie_break_left=True)
        tl.store(chosen + image * k + step, tl.where(best > float("-inf"), pick, -1))
        free = free & (rows != pick)
        gain = tl.where(free, gain, float("-inf"))
        row = cover + pick * by_row + columns * by_column
        row = tl.load(row, mask=columns < targets, other=0.0)
        covered = tl.maximum(covered, row)


def greedy_select(
    similarity: Tensor, scores: Tensor, k: int, rule: SelectionRule, valid: Tensor | None = None
) -> Tensor:
    """Returns what `op.greedy_select` describes, all steps in one launch."""
    images, tokens = scores.shape
    chosen = torch.empty(images, k, dtype=torch.long, device=scores.device)
    if chosen.numel() == 0 or tokens == 0:
        return chosen.fill_(-1)
    free = None if valid is None else valid.contiguous().view(torch.int8)
    if rule == "coverage":
        targets = similarity.shape[2]
        _cover_kernel[(images,)](
            similarity, scores.contiguous(), free, chosen, *similarity.stride(), k, tokens, targets,
            BLOCK=triton.next_power_of_2(tokens), THINGS=triton.next_power_of_2(targets),
        )  # fmt: skip
        return chosen
    factor = None
    if rule == "dpp":
        factor = torch.empty(images, k, tokens, device=scores.device)
    _select_kernel[(images,)](
        similarity, scores.contiguous(), free, factor, chosen,
        *similarity.stride(), k, tokens,
        RULE=rule, SPENT=SPENT * torch.finfo(torch.float32).eps, BLOCK=triton.next_power_of_2(tokens),
    )  # fmt: skip
    return chosen
