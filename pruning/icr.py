"""In-context re-ranking: images by the attention of a question less that of an empty one."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vlm_prune.pruning.received import from_rows
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.families import family_of
from vlm_prune.vlm.layout import alike
from vlm_prune.vlm.probe import question_rows

OUTLIER = 2.0


def image_relevance(model: Any, inputs: Mapping[str, Any], empty: Mapping[str, Any]) -> Tensor:
    """Returns how relevant each image of some prompts is to its question, (M,), without generating.

    https://arxiv.org/abs/2410.02642

    A token's score is the attention of the question's tokens to it, the mean over them and over heads,
    summed over all layers. That of an empty question, such as N/A, is taken off, which leaves what
    images get whatever is asked. Tokens more than two standard deviations below their image's mean
    are left out; an image has the sum of the others. The paper caches the documents for both
    questions, here both prompts run whole.

    Args:
        model: of a supported family; only images are ranked.
        inputs: what the processor gives for prompts, as for `question_rows`.
        empty: the same with an empty question in place of each.

    Raises:
        InputError: if the prompts have other images, or a layer has no attention that could be scored.
    """
    family = family_of(model)
    counts = family.counts(inputs["input_ids"], inputs)
    if family.counts(empty["input_ids"], empty) != counts:
        raise InputError(
            "the prompts with an empty question have other images; give the same prompts with N/A for "
            "the question"
        )
    question, blank = (_summed(model, given) for given in (inputs, empty))
    found = torch.zeros(len(counts), device=question[0].device)
    for members, ours, theirs in zip(alike(counts), question, blank, strict=True):
        calibrated = ours - theirs
        mean, spread = calibrated.mean(1, keepdim=True), calibrated.std(1, keepdim=True)
        # one token has no spread
        low = mean - OUTLIER * spread.nan_to_num()
        found[list(members)] = (calibrated * (calibrated >= low)).sum(1)
    return found


def _summed(model: Any, inputs: Mapping[str, Any]) -> list[Tensor]:
    """Returns the attention that images' tokens get of their questions, summed over layers.

    Returns a tensor (M, n) for the images of each number of tokens.
    """
    total: list[Tensor] = []
    for groups in question_rows(model, inputs):
        received = [from_rows(rows, rows.columns).float() for rows in groups]
        total = [a + b for a, b in zip(total, received, strict=True)] if total else received
    return total
