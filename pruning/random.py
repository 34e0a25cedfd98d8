"""Control: tokens at random."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlm_prune.pruning.base import DecoderScorePruner, Pruner, ScorePruner, Stage
from vlm_prune.pruning.schedule import check_layer
from vlm_prune.vlm.tokens import DecoderTokens, Kept, VisionTokens

SPREAD = 2654435761


@dataclass
class Random(ScorePruner):
    """Keep tokens drawn uniformly, anew for each image; the draw depends on its pixels and `seed`.

    Of a video they are drawn among the tokens of all frames.
    """

    stage: ClassVar[Stage] = "projector"

    @classmethod
    def at_layer(cls, layer: int) -> Pruner:
        return RandomInside(layer=layer)

    def score(self, vision: VisionTokens) -> Tensor:
        return drawn(vision.projected, self.seed, vision.seeds)

    def reduce_video(self, vision: VisionTokens) -> Kept:
        return self.reduce(vision)


@dataclass
class RandomInside(DecoderScorePruner):
    """Keep tokens drawn uniformly after a decoder layer: `random@16`, and `divprune+random@16` as the
    control for methods that cut at depth, where published ones were found to be no better than it
    (https://arxiv.org/abs/2512.07580).

    Args:
        layer: decoder layers (of 32) that have run when tokens are dropped.

    The draw depends on the question, the number of the image in the prompt and `seed`.
    """

    layer: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layer(self.layer)

    def pattern(self) -> list[tuple[int, float]]:
        return [(self.layer, 1)]

    def score(self, tokens: DecoderTokens) -> Tensor:
        return drawn(tokens.features, self.seed, tokens.seeds)


def drawn(tokens: Tensor, seed: int, seeds: Sequence[int]) -> Tensor:
    """Returns a uniform random number for each token, (M, N), whatever batch an image is in.

    Args:
        tokens: (M, N, d).
        seed: the method's.
        seeds: one number for each image.
    """
    # torch's generator takes 32 bits of a seed: a product with an odd number loses none of the method's
    mixed = [(image + seed * SPREAD) % 2**32 for image in seeds]
    rows = [
        torch.rand(tokens.shape[1], generator=torch.Generator().manual_seed(number))
        for number in mixed
    ]
    return torch.stack(rows).to(tokens.device)
