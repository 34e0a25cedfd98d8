"""ZOO-Prune: keep tokens to which the projector is sensitive, and that differ from each other."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from vlm_prune.kernels.token_sensitivity import closed_form, monte_carlo, weight_kernel, weight_root
from vlm_prune.pruning.base import Stage, VisionPruner
from vlm_prune.pruning.select import diverse, min_max
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.families import Need
from vlm_prune.vlm.projector import Projector, Weights
from vlm_prune.vlm.tokens import Kept, VisionTokens, top

Combine = Literal["product", "sensitivity", "diversity"]


@dataclass
class Zoo(VisionPruner):
    """Zeroth-order sensitivity of the projector times diversity of its outputs.

    https://arxiv.org/abs/2509.24837

    Args:
        directions: random unit directions, shared by all tokens and images.
        step: length h of the central difference.
        combine: `product` is the method, the other two its ablations.

    Differences are taken between pre-activations, where the step is exact: the same estimator in
    exact arithmetic, without the rounding that fp16 inputs suffer. The second layer stands as the
    triangle of its QR decomposition, which leaves norms as they are.
    """

    directions: int = 64
    step: float = 0.01
    combine: Combine = "product"
    stage: ClassVar[Stage] = "projector"
    paper: ClassVar[str] = "https://arxiv.org/abs/2509.24837"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._choice("combine", get_args(Combine))
        if self.directions < 1 or self.step <= 0:
            raise InputError("directions must be at least 1 and step above 0")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"a two-layer projector"} if self.combine != "diversity" else ())

    @torch.no_grad()
    def sensitivity(self, vision: VisionTokens) -> Tensor:
        """(M, N), the mean change of the output along random directions."""
        width = vision.features.shape[-1]
        generator = torch.Generator().manual_seed(self.seed)
        bank = torch.randn(self.directions, width, generator=generator)
        bank = (bank / bank.norm(dim=1, keepdim=True)).to(vision.features.device)
        projector = two_layer_projector(vision)
        w = projector.weights(vision.features)
        return monte_carlo(vision.features, w.w1, w.b1, projector.act, root_of(w), bank, self.step)

    def reduce(self, vision: VisionTokens) -> Kept:
        k, features = self.count(vision), vision.projected
        if self.combine == "diversity":
            scores = torch.ones(features.shape[:2], device=features.device)
        else:
            scores = min_max(self.sensitivity(vision))
        if self.combine == "sensitivity":
            return Kept.at(features, top(scores, k))
        return Kept.at(features, diverse(scores, features, k).sort(1).values)


def two_layer_projector(vision: VisionTokens) -> Projector:
    """Returns the projector; a linear one would make all tokens equally sensitive.

    Raises:
        InputError: when it has no two layers.
    """
    if not isinstance(vision.projector, Projector):
        raise InputError("the sensitivity of tokens needs a projector of two layers; try divprune")
    return vision.projector


@dataclass
class ZooExact(Zoo):
    """ZOO-Prune with the sensitivity in closed form: no sampling, one matrix product per image.

    For many directions and small steps the mean norm tends to sqrt(d^T K d / d_v), where d is the
    activation's derivative at the token and K = (W2^T W2) * (W1 W1^T). Ours; `directions`, `step`
    and `seed` are unused.
    """

    paper: ClassVar[str] = ""

    @torch.no_grad()
    def sensitivity(self, vision: VisionTokens) -> Tensor:
        projector = two_layer_projector(vision)
        w = projector.weights(vision.features)
        return closed_form(vision.features, w.w1, w.b1, projector.act, kernel_of(w))


class PerWeights:
    """What is made of a projector's weights, once for each.

    It outlives the method, which a cascade makes anew for each prompt, but not the weights.
    """

    def __init__(self, make: Callable[[Weights], Tensor]) -> None:
        self.make = make
        self.results: WeakKeyDictionary[Weights, Tensor] = WeakKeyDictionary()

    def __call__(self, weights: Weights) -> Tensor:
        if weights not in self.results:
            self.results[weights] = self.make(weights)
        return self.results[weights]


root_of = PerWeights(lambda weights: weight_root(weights.w2))
kernel_of = PerWeights(lambda weights: weight_kernel(weights.w1, weights.w2))
