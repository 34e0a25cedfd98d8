"""Sequential selection: one program per image runs all its steps."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlm_prune.kernels.greedy_select.reference import SPENT, Rule


@triton.jit
def _select_kernel(
    similarity, scores, valid, factor, chosen, by_image, by_row, by_column, k, tokens,
    RULE: tl.constexpr, SPENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    similarity += image * by_image
    factor += image * k * tokens
    places = tl.arange(0, BLOCK)
    inside = places < tokens
    score = tl.load(scores + image * tokens + places, mask=inside, other=0.0)
    free = tl.load(valid + image * tokens + places, mask=inside, other=0)
    nearest = tl.zeros([BLOCK], tl.float32)
    diagonal = tl.load(similarity + places * (by_row + by_column), mask=inside, other=0.0)
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
        best = tl.max(gain, 0)
        pick = tl.min(tl.where((gain == best) & (free != 0), places, BLOCK), 0)
        tl.store(chosen + image * k + step, tl.where(pick < tokens, pick, -1))
        free = tl.where(places == pick, 0, free)
        at = tl.minimum(pick, tokens - 1)
        row = similarity + at * by_row + places * by_column
        closest = tl.load(row, mask=inside, other=0.0)
        nearest = tl.where(step == 0, closest, tl.maximum(nearest, closest))
        if RULE == "dpp":
            size = tl.sum(tl.where(places == pick, residual, 0.0), 0)
            part = tl.sum(tl.where(places == pick, score, 0.0), 0) * score * closest
            past = tl.zeros([BLOCK], tl.float32)
            for earlier in range(step):
                vector = tl.load(factor + earlier * tokens + places, mask=inside, other=0.0)
                past += tl.load(factor + earlier * tokens + at) * vector
            part = tl.where(size > 0, (part - past) / tl.sqrt(tl.where(size > 0, size, 1.0)), 0.0)
            tl.store(factor + step * tokens + places, part, mask=inside)
            tl.debug_barrier()  # the next step reads this row across threads
            residual -= part * part


def greedy_select(
    similarity: Tensor, scores: Tensor, k: int, rule: Rule, valid: Tensor | None = None
) -> Tensor:
    images, tokens = scores.shape
    chosen = torch.empty(images, k, dtype=torch.long, device=scores.device)
    if chosen.numel() == 0 or tokens == 0:
        return chosen.fill_(-1)
    valid = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
    factor = torch.empty(images, k if rule == "dpp" else 0, tokens, device=scores.device)
    _select_kernel[(images,)](
        similarity, scores.contiguous(), valid.to(torch.int8).contiguous(), factor, chosen,
        *similarity.stride(), k, tokens,
        RULE=rule, SPENT=SPENT * torch.finfo(torch.float32).eps, BLOCK=triton.next_power_of_2(tokens),
    )  # fmt: skip
    return chosen
