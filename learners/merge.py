"""Merging a tuned language model with its base, without training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.files import output_folder
from vlm_prune.vlm.families import family_of
from vlm_prune.vlm.load import load, save


@torch.no_grad()
def merge(base: Any, tuned: Any, alpha: float) -> None:
    """Move the tuned language model back toward its base, in place: base + alpha (tuned - base).

    Needs no training, and rescues a model that has been tuned already; sweep `alpha` over [0, 1].

    Args:
        base: the model before tuning.
        tuned: the tuned model, which is changed.
        alpha: share of the tuning that stays, in [0, 1].

    Raises:
        InputError: if `alpha` is out of range, or the two language models differ in shape.
    """
    _check(alpha)
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


def _check(alpha: float) -> None:
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha {alpha} is out of range; give 0 (the base) to 1 (as tuned)")


def sweep(base: str, tuned: str, output: Path, alphas: Sequence[float]) -> list[Path]:
    """Write one checkpoint of a tuned model for each alpha; returns their folders.

    Args:
        base: folder or name of the checkpoint before tuning.
        tuned: folder or name of the tuned checkpoint.
        output: folder that gets a folder for each alpha.
        alphas: as for `merge`.

    Raises:
        InputError: if an alpha is out of range, `output` is no folder for results, or the two
            language models differ in shape.
    """
    output_folder(output)
    for alpha in alphas:
        _check(alpha)
    original, folders = load(base, "cpu")[0], [output / f"alpha-{alpha:g}" for alpha in alphas]
    for alpha, folder in zip(alphas, folders, strict=True):
        model, processor = load(tuned, "cpu")
        merge(original, model, alpha)
        save(model, processor, folder)
    return folders
