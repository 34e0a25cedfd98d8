"""Patches that an image shows more than once are kept once."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlm_prune.pruning.compose import MethodWrapper
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.distinct_views import first_equal
from vlm_prune.vlm.encoded import Images
from vlm_prune.vlm.families import Family
from vlm_prune.vlm.prompt_pruning import BeforeModel
from vlm_prune.vlm.tokens import Kept, VisionTokens


@dataclass
class Dedupe(MethodWrapper):
    """Drop each token whose pixels equal those of an earlier token of its image; a method chooses
    among the others where they are more than the budget, which is a ceiling: `divprune+dedupe`.

    After vLLM's request for this on documents and screens (vllm-project/vllm#39708). With a budget
    of 1.0 all that goes are repetitions: every patch of the image is still there once, with the
    features of the first place where it stands.

    Args:
        method: chooses among tokens that differ; its own budget, positions and seed are replaced.
        threshold: patches count as equal whose pixels round to the same multiples of it, as values
            that the tower reads; what is dropped differs by at most so much. At 0 all are equal bit
            by bit.

    Where the tower takes tiles or frames that do not see each other (LLaVA, InternVL, SmolVLM,
    Gemma 3 and their relatives), those with equal pixels pass through it once, with the same result.
    Other repetitions go behind the tower: a patch sees its whole tile, and in Qwen's towers, whose
    windows some layers leave, the whole image, so that what is dropped there would change the rest.
    """

    threshold: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold < 0:
            raise InputError(f"threshold {self.threshold} is negative; give 0 or more")

    def before_model(self, family: Family, vision: Images | None) -> BeforeModel:
        return replace(super().before_model(family, vision), distinct_views=True)

    def reduce(self, vision: VisionTokens) -> Kept:
        tokens, k = vision.projected, self.count(vision)
        new = first_of_their_kind(vision.patches().to(tokens.device), self.threshold)
        method = self.wrapped(k)
        left = new.sum(1).tolist()
        # without duplicates the method sees the images as they are
        if min(left) == tokens.shape[1] > k:
            return method.reduce(vision)
        indices, features = [], []
        for image, count in enumerate(left):
            distinct_indices, chosen = new[image].nonzero()[:, 0], tokens[image, new[image]]
            # the method chooses among the distinct ones, which are one row to it
            if count > k:
                distinct = replace(
                    vision.of(image, new[image]), grids=((1, count),), available=count
                )
                kept = method.reduce(distinct)
                distinct_indices, chosen = distinct_indices[kept.indices[0]], kept.features[0]
            indices.append(distinct_indices)
            features.append(chosen)
        return Kept(indices, features)


def first_of_their_kind(patches: Tensor, threshold: float) -> Tensor:
    """Returns whether no earlier patch of the image equals each one; (M, N, p) -> (M, N).

    Args:
        patches: pixels of each token.
        threshold: of pixels that count as equal, 0 for those that are.
    """
    values = patches.float()
    if threshold:
        values = (values / threshold).round()
    index = torch.arange(values.shape[1], device=values.device)
    return torch.stack([first_equal(image) == index for image in values])
