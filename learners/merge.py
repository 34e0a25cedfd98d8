"""Merging a tuned language model with its base, without training."""

from typing import Any

import torch

from vlm_prune.vlm.errors import InputError
from vlm_prune.vlm.families import family_of


@torch.no_grad()
def merge(base: Any, tuned: Any, alpha: float) -> None:
    """Move the tuned language model back towards its base, in place: base + alpha (tuned - base).

    Needs no training, and rescues a model that has been tuned already; sweep `alpha` over [0, 1].

    Raises:
        InputError: if the two language models differ in shape.
    """
    ours, theirs = (
        dict(family_of(model).decoder.named_parameters())
        | {f"head.{n}": p for n, p in model.get_output_embeddings().named_parameters()}
        for model in (tuned, base)
    )
    if {n: p.shape for n, p in ours.items()} != {n: p.shape for n, p in theirs.items()}:
        raise InputError("the two models' language models differ; merge a model with its own base")
    moved: set[int] = set()
    for name, parameter in ours.items():
        if parameter.data_ptr() not in moved:
            parameter.copy_(theirs[name].lerp(parameter, alpha))
            moved.add(parameter.data_ptr())
