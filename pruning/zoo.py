"""ZOO-Prune: keep tokens to which the projector is sensitive, and that differ from each other."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Generic, Literal, TypeVar, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from vlm_prune.kernels.token_sensitivity import (
    closed_form,
    directional,
    monte_carlo,
    weight_kernel,
    weight_root,
)
from vlm_prune.kernels.visible import at_least_fp32
from vlm_prune.pruning.base import Stage, VisionPruner
from vlm_prune.pruning.select import diverse, min_max
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.families import Need
from vlm_prune.vlm.projector import Map, Projector, Weights
from vlm_prune.vlm.tokens import Kept, VisionTokens, top

Combine = Literal["product", "sensitivity", "diversity"]
Estimator = Literal["auto", "difference", "derivative"]
Result = TypeVar("Result")


@dataclass
class Zoo(VisionPruner):
    """Zeroth-order sensitivity of the projector times diversity of its outputs.

    https://arxiv.org/abs/2509.24837

    Args:
        directions: random unit directions, shared by all tokens and images.
        step: length h of the central difference.
        combine: `product` is the method, the other two its ablations.
        rank: of both layers of the projector, cut by singular value decomposition for the
            estimate; 0 leaves them whole. The authors give 128 for LLaVA-NeXT, on which their
            speed was measured.
        estimator: `difference` is the central difference of the paper, `derivative` its limit for
            small steps, which costs a fraction with a small rank; `auto` is the latter where a rank is
            given.

    Differences are taken between pre-activations, where the step is exact: the same estimator in
    exact arithmetic, without the rounding that fp16 inputs suffer. The second layer stands as the
    triangle of its QR decomposition, which leaves norms as they are. A projector of other layers is
    sampled as the paper writes it, in its own precision; a linear one moves every token equally.
    """

    directions: int = 64
    step: float = 0.01
    combine: Combine = "product"
    rank: int = 0
    estimator: Estimator = "auto"
    stage: ClassVar[Stage] = "projector"
    paper: ClassVar[str] = "https://arxiv.org/abs/2509.24837"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._choice("combine", get_args(Combine))
        self._choice("estimator", get_args(Estimator))
        if self.directions < 1 or self.step <= 0:
            raise InputError("directions must be at least 1 and step above 0")
        if self.rank < 0:
            raise InputError(
                f"rank {self.rank} is negative; give 128, or 0 for the whole projector"
            )

    @property
    def needs(self) -> frozenset[Need]:
        needs: set[Need] = set()
        if self.combine != "diversity":
            needs.add("a nonlinear projector (a linear one is equally sensitive to all tokens)")
            if self.rank or self.estimator == "derivative":
                needs.add("a two-layer projector")
        return frozenset(needs)

    @torch.no_grad()
    def sensitivity(self, vision: VisionTokens) -> Tensor:
        """(M, N), the mean change of the output along random directions."""
        features, projector = vision.features, vision.projector
        generator = torch.Generator().manual_seed(self.seed)
        # unit vectors, the same for all tokens
        bank = torch.randn(self.directions, features.shape[-1], generator=generator)
        bank = (bank / bank.norm(dim=1, keepdim=True)).to(features.device)
        whole = not self.rank and self.estimator != "derivative"
        if not isinstance(projector, Projector) and whole:
            return sampled(projector, features, bank, self.step)
        w = self.weights(vision)
        act = two_layer_projector(vision).act
        if not whole and self.estimator != "difference":
            return directional(features, w.w1, w.b1, act, root_of(w), bank)
        return monte_carlo(features, w.w1, w.b1, act, root_of(w), bank, self.step)

    def weights(self, vision: VisionTokens) -> Weights:
        """The projector's matrices, of which norms of outputs are the same; cut to `rank`."""
        weights = two_layer_projector(vision).weights(vision.features)
        return truncation(self.rank)(weights) if self.rank else weights

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


def sampled(project: Map, features: Tensor, bank: Tensor, step: float) -> Tensor:
    """Returns the mean over directions u of |M(x + hu) - M(x - hu)| / 2h for any map M, as the
    paper has it.

    Shapes: features (M, N, d_v), bank (m, d_v) -> (M, N), in at least fp32.

    Args:
        project: M.
        features: tokens x.
        bank: directions u, one per row.
        step: h.
    """
    total = torch.zeros(features.shape[:2], device=features.device)
    for direction in bank.to(features.dtype):
        # central differences
        there, back = project(features + step * direction), project(features - step * direction)
        total += (there - back).float().norm(dim=-1)
    return total / (2 * step * len(bank))


@dataclass
class ZooExact(Zoo):
    """ZOO-Prune with the sensitivity in closed form: no sampling, one matrix product per image.

    For many directions and small steps the mean norm tends to sqrt(d^T K d / d_v), where d is the
    activation's derivative at the token and K = (W2^T W2) * (W1 W1^T). Ours; `directions`, `step`,
    `estimator` and `seed` are unused.
    """

    paper: ClassVar[str] = ""

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"a two-layer projector"} if self.combine != "diversity" else ())

    @torch.no_grad()
    def sensitivity(self, vision: VisionTokens) -> Tensor:
        w, act = self.weights(vision), two_layer_projector(vision).act
        return closed_form(vision.features, w.w1, w.b1, act, kernel_of(w))


class PerWeights(Generic[Result]):
    """What is made of a projector's weights, once for each.

    It outlives the method, which a cascade makes anew for each prompt, but not the weights.
    """

    def __init__(self, make: Callable[[Weights], Result]) -> None:
        self.make = make
        self.results: WeakKeyDictionary[Weights, Result] = WeakKeyDictionary()

    def __call__(self, weights: Weights) -> Result:
        if weights not in self.results:
            self.results[weights] = self.make(weights)
        return self.results[weights]


root_of = PerWeights(lambda weights: weight_root(weights.w2))
kernel_of = PerWeights(lambda weights: weight_kernel(weights.w1, weights.w2))


@lru_cache
def truncation(rank: int) -> PerWeights[Weights]:
    """What makes weights of that rank: W1 on its largest right singular vectors V, and of W2 = U S V^T
    the rows S V^T, without the rotation U, which leaves norms as they are.
    """

    def cut(weights: Weights) -> Weights:
        one, two = at_least_fp32(weights.w1), at_least_fp32(weights.w2)
        _, vectors = squared_spectrum(one, rank)
        sizes, rows = squared_spectrum(two, rank)
        # W1 is projected; W2 loses rows and its rotation
        w1 = (one @ vectors) @ vectors.T
        w2 = sizes.clamp_min(0).sqrt()[:, None] * rows.T
        return Weights(w1.to(weights.w1.dtype), weights.b1, w2.to(weights.w2.dtype), None)

    return PerWeights(cut)


def squared_spectrum(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Squares of the largest singular values (r,) of a matrix (m, n), and its right singular
    vectors (n, r): the eigenvectors of its Gram matrix take a sixth of the decomposition's time.
    """
    values, vectors = torch.linalg.eigh(weight.T @ weight)
    return values[-rank:], vectors[:, -rank:]
