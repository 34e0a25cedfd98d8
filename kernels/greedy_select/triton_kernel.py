"""Sequential selection: one program per image runs all its steps."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlm_prune.kernels.greedy_select.reference import RESIDUAL, Rule


@triton.jit
def _select_kernel(
    similarity, scores, valid, basis, chosen, by_image, by_row, by_column, k, tokens,
    RULE: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    similarity += image * by_image
    basis += image * k * tokens
    places = tl.arange(0, BLOCK)
    inside = places < tokens
    score = tl.load(scores + image * tokens + places, mask=inside, other=0.0)
    free = tl.load(valid + image * tokens + places, mask=inside, other=0)
    nearest = tl.zeros([BLOCK], tl.float32)
    diagonal = tl.load(similarity + places * (by_row + by_column), mask=inside, other=0.0)
    residual = score * score * diagonal
    for step in range(k):
        if RULE == "dpp":
            gain = tl.where(residual > RESIDUAL, residual, 0.0)
        elif RULE == "diverse":
            gain = tl.where(step == 0, score, score * (1 - nearest))
        else:
            gain = tl.where(step == 0, score, -nearest)
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
                vector = tl.load(basis + earlier * tokens + places, mask=inside, other=0.0)
                past += tl.load(basis + earlier * tokens + at) * vector
            part = tl.where(
                size > RESIDUAL, (part - past) / tl.sqrt(tl.maximum(size, RESIDUAL)), 0.0
            )
            tl.store(basis + step * tokens + places, part, mask=inside)
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
    basis = torch.empty(images, k if rule == "dpp" else 0, tokens, device=scores.device)
    _select_kernel[(images,)](
        similarity, scores.contiguous(), valid.to(torch.int8).contiguous(), basis, chosen,
        *similarity.stride(), k, tokens,
        RULE=rule, RESIDUAL=RESIDUAL, BLOCK=triton.next_power_of_2(tokens),
    )  # fmt: skip
    return chosen
