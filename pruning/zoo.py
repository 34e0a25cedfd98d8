"""ZOO-Prune: keep tokens to which the projector is sensitive, and that differ from each other."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Generic, Literal, Self, TypeVar, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from vlm_prune.kernels.dispatch import multiplies_bf16
from vlm_prune.kernels.pairwise_cosine import pairwise_cosine
from vlm_prune.kernels.token_sensitivity import (
    closed_form,
    directional,
    monte_carlo,
    weight_kernel,
    weight_root,
)
from vlm_prune.kernels.token_sensitivity.reference import (
    mean_lengths,
    mean_lengths_in_bf16,
    pre_activation,
    quadratic,
    slopes,
)
from vlm_prune.kernels.visible import at_least_fp32
from vlm_prune.pruning.base import OrderPruner, Stage
from vlm_prune.pruning.select import diverse, min_max
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.families import Need
from vlm_prune.vlm.projector import Map, Projector, Weights
from vlm_prune.vlm.tokens import VisionTokens, ranked

Combine = Literal["product", "sensitivity", "diversity"]
Estimator = Literal["auto", "difference", "derivative"]
Result = TypeVar("Result")
FEW = 8  # tokens that are computed together
MARGIN = 4.0
SCREENED = 64  # tokens that are computed before all are looked at in low precision
TOLERANCE = 2**-9  # of a length, around what low precision gives
ROUNDING = 1e-5  # of the largest quadratic form: more than single precision loses


@dataclass
class Zoo(OrderPruner):
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
            small steps, from which it differs by less than 1e-5 of the largest sensitivity; `auto` is the
            latter on a CPU and where a rank is given.

    Differences are taken between pre-activations, where the step is exact: the same estimator in
    exact arithmetic, without the rounding that fp16 inputs suffer. The second layer stands as the
    triangle of its QR decomposition, which leaves norms as they are. On a CPU derivatives are taken
    of those tokens alone on which the choice depends (`BoundedSensitivity`). A projector of other
    layers is sampled as the paper writes it, in its own precision; a linear one moves every token
    equally. The authors scale and choose within each tile of LLaVA-NeXT; here all tiles of an image
    compete.
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
            if self.needs_two_layers:
                needs.add("a two-layer projector")
        return frozenset(needs)

    @torch.no_grad()
    def sensitivity(self, vision: VisionTokens) -> Tensor:
        """Returns the mean change of the output along random directions, (M, N)."""
        features, projector, bank = vision.features, vision.projector, self.bank(vision)
        if not isinstance(projector, Projector) and not self.needs_two_layers:
            return sampled(projector, features, bank, self.step)
        w = self.weights(vision)
        act = two_layer_projector(vision).act
        if self.derives(vision):
            return directional(features, w.w1, w.b1, act, root_of(w), bank)
        return monte_carlo(features, w.w1, w.b1, act, root_of(w), bank, self.step)

    def bank(self, vision: VisionTokens) -> Tensor:
        """Returns the directions (m, d_v): unit vectors, the same for all tokens."""
        generator = torch.Generator().manual_seed(self.seed)
        bank = torch.randn(self.directions, vision.features.shape[-1], generator=generator)
        unit: Tensor = bank / bank.norm(dim=1, keepdim=True)
        return unit.to(vision.features.device)

    @property
    def needs_two_layers(self) -> bool:
        """Returns whether the method needs a projector of two layers."""
        return bool(self.rank) or self.estimator == "derivative"

    def derives(self, vision: VisionTokens) -> bool:
        """Returns whether it is the derivative that is taken of this projector."""
        if self.estimator != "auto":
            return self.estimator == "derivative"
        two_layers = isinstance(vision.projector, Projector)
        return bool(self.rank) or (two_layers and vision.features.device.type == "cpu")

    def weights(self, vision: VisionTokens) -> Weights:
        """Returns the projector's matrices, cut to `rank`; the output rotation may
        be left out, as norms do not see it.
        """
        weights = two_layer_projector(vision).weights(vision.features)
        return truncation(self.rank)(weights) if self.rank else weights

    def order(self, vision: VisionTokens, count: int) -> Tensor:
        features = vision.projected
        if self.combine == "diversity":
            scores = torch.ones(features.shape[:2], device=features.device)
            return diverse(scores, features, count)
        if self.combine == "sensitivity":
            return ranked(min_max(self.sensitivity(vision)), count)
        return self.product(vision, count)

    def order_kind(self, vision: VisionTokens, count: int) -> bool:
        """Returns whether sensitivities are bounded: rounding may order them otherwise than all do."""
        return self.is_bounded(vision, count)

    def is_bounded(self, vision: VisionTokens, k: int) -> bool:
        """Returns whether only the sensitivities on which a choice of k tokens depends are computed."""
        # where most tokens are kept, most sensitivities are needed anyway
        few = 2 * k < vision.features.shape[1] and vision.features.device.type == "cpu"
        return few and self.combine == "product" and self.derives(vision)

    @torch.no_grad()
    def product(self, vision: VisionTokens, k: int) -> Tensor:
        """Returns the chosen tokens (M, k), in order: greedily by sensitivity x diversity."""
        if not self.is_bounded(vision, k):
            return diverse(min_max(self.sensitivity(vision)), vision.projected, k)
        bank, act, weights = (
            self.bank(vision),
            two_layer_projector(vision).act,
            self.weights(vision),
        )
        sensitivities = BoundedSensitivity.of(vision.features, weights, act, bank)
        similarity = pairwise_cosine(vision.projected, vision.projected)
        pairs = zip(sensitivities, similarity, strict=True)
        return torch.stack([scores.diverse(alike, k) for scores, alike in pairs])


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
        ahead, behind = project(features + step * direction), project(features - step * direction)
        total += (ahead - behind).float().norm(dim=-1)
    return total / (2 * step * len(bank))


@dataclass
class BoundedSensitivity:
    """Sensitivities of one image's tokens, each computed once a choice depends on it.

    The mean of lengths over directions is at most their root mean square, which is one quadratic form
    for all directions together: d^T ((W2^T W2) * (S^T S)) d / m, with d the activation's derivative at
    the token and S the m directions behind the first layer. A choice of the largest is certain
    once what is chosen is computed, as all others are at most their bounds. For the smallest, whose
    bound says nothing from below, all tokens are computed that would be smaller if their mean fell
    short of its bound `MARGIN` times as far as any token's so far.

    Where these bounds do not decide, and the processor has matrix units for bfloat16, the lengths of all
    tokens are computed in it once. From then on those unknown lie within a tolerance of these, which is
    `MARGIN` times the largest deviation of a token that is known, and `TOLERANCE` at least.

    Args:
        slope: d of each token, (N, h).
        shifts: S, (m, h).
        root: of the second layer, (r, h).
        values: bounds, and sensitivities where these are `known`, (N,).
        known: which tokens' sensitivity is computed, (N,).
        shortfall: the largest share by which one fell short of its bound.
        rough: lengths in bfloat16, (N,); None until they are computed.
        tolerance: around these, a share.
    """

    slope: Tensor
    shifts: Tensor
    root: Tensor
    values: Tensor
    known: Tensor
    shortfall: float = 0.0
    rough: Tensor | None = None
    tolerance: float = TOLERANCE

    def __post_init__(self) -> None:
        self.bounds = self.values.clone()

    @classmethod
    def of(cls, features: Tensor, weights: Weights, act: Map, bank: Tensor) -> list[Self]:
        """Returns the bounds of each image.

        Args:
            features: tokens (M, N, d_v).
            weights: of the projector.
            act: its activation.
            bank: directions (m, d_v).
        """
        # (M, N, h), and the directions behind the first layer, (m, h)
        slope = slopes(pre_activation(features, weights.w1, weights.b1), act)
        shifts = pre_activation(bank, weights.w1, None).to(slope)
        root, gram = root_of(weights).to(slope), gram_of(weights).to(slope)
        # mean squares over all directions in one form; rounding must not make a bound too low
        squares = quadratic(slope.flatten(0, 1), gram * (shifts.T @ shifts) / len(shifts))
        bounds = (squares + ROUNDING * squares.amax()).clamp_min(0).sqrt().view(slope.shape[:2])
        known = torch.zeros_like(bounds, dtype=torch.bool)
        return [cls(d, shifts, root, *rest) for d, *rest in zip(slope, bounds, known, strict=True)]

    def compute(self, order: Tensor) -> None:
        """Computes the sensitivities of the few tokens with the largest
        `order` (N,) of those unknown.
        """
        # those that may win first; computed lengths replace their bounds
        order = order.masked_fill(self.known, -torch.inf)
        tokens = order.topk(min(FEW, int((~self.known).sum()))).indices
        lengths, bounds = (
            mean_lengths(self.slope[tokens], self.shifts, self.root),
            self.values[tokens],
        )
        self.shortfall = max(self.shortfall, float((1 - lengths / bounds).nan_to_num(0).max()))
        self.values[tokens], self.known[tokens] = lengths, True
        if self.rough is None and self.is_screened:
            self.rough = mean_lengths_in_bf16(self.slope, self.shifts, self.root).to(self.values)
        if self.rough is not None:
            self.narrow(self.rough)

    @property
    def is_screened(self) -> bool:
        """Returns whether it is time to look at all tokens in low precision, and quick."""
        return int(self.known.sum()) >= SCREENED and multiplies_bf16(self.slope.device)

    def narrow(self, rough: Tensor) -> None:
        """Sets the tolerance around lengths in low precision (N,), and the bounds of tokens that are not
        known to its upper end.
        """
        away = torch.where(self.known, (self.values / rough - 1).abs(), 0).nan_to_num(0)
        self.tolerance = max(self.tolerance, MARGIN * float(away.max()))
        upper = torch.minimum(self.bounds, rough * (1 + self.tolerance))
        self.values = torch.where(self.known, self.values, upper)

    def reach(self) -> Tensor:
        """Returns how low the sensitivity of each token may be, (N,)."""
        if self.rough is not None:
            return self.rough * (1 - self.tolerance)
        # if it falls short of its bound as far as `MARGIN` allows
        return self.values * max(0.0, 1 - MARGIN * self.shortfall)

    def largest(self) -> Tensor:
        """Returns the largest sensitivity, ()."""
        while not self.known[self.values.argmax()]:
            self.compute(self.values)
        return self.values.max()

    def smallest(self) -> Tensor:
        """Returns the smallest sensitivity, ()."""
        while True:
            least = self.values.masked_fill(~self.known, torch.inf).min()
            reach = self.reach()
            if self.known.any() and not (~self.known & (reach <= least)).any():
                return least
            self.compute(-reach)

    def diverse(self, similarity: Tensor, k: int) -> Tensor:
        """Returns what `select.diverse` chooses of sensitivities scaled to [0, 1], (k,) in that order.

        Args:
            similarity: cosines of the tokens, (N, N).
            k: tokens to choose.
        """
        while True:
            high, low = self.largest(), self.smallest()
            chosen = self._diverse(similarity, k, low, high)
            # tokens computed on the way may have told that another could be the smallest
            if not self.smallest() < low:
                return chosen

    def _diverse(self, similarity: Tensor, k: int, low: Tensor, high: Tensor) -> Tensor:
        """Chooses k tokens as `select.diverse` does, computing only
        sensitivities that may win a step.

        Args:
            similarity: of tokens, (N, N).
            k: how many.
            low: the smallest sensitivity, which becomes score 0.
            high: the largest one, which becomes score 1.
        """

        def scaled() -> Tensor:
            return torch.where(high > low, (self.values - low) / (high - low + 1e-8), 1.0)

        scores, taken = scaled(), torch.zeros_like(self.known)
        nearest: Tensor | None = None
        chosen: list[int] = []
        while len(chosen) < k:
            gain = scores
            if nearest is not None:
                # a bound times a rounding error below zero would be none
                apart = 1 - nearest
                gain = torch.where(self.known, apart, apart.clamp_min(0)).mul_(scores)
            gain = gain.masked_fill(taken, -torch.inf)
            pick = int(gain.argmax())
            if not self.known[pick]:
                self.compute(gain)
                scores = scaled()
                continue
            chosen.append(pick)
            taken[pick] = True
            similarity_to_pick = similarity[pick]
            nearest = (
                similarity_to_pick
                if nearest is None
                else torch.maximum(nearest, similarity_to_pick)
            )
        return torch.tensor(chosen)


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

    def derives(self, vision: VisionTokens) -> bool:
        return False

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


gram_of = PerWeights(lambda weights: at_least_fp32(weights.w2).T @ at_least_fp32(weights.w2))
root_of = PerWeights(lambda weights: weight_root(weights.w2))
kernel_of = PerWeights(lambda weights: weight_kernel(weights.w1, weights.w2))


@lru_cache
def truncation(rank: int) -> PerWeights[Weights]:
    """Returns the map from weights to weights of a lower rank.

    W1 is projected on its largest right singular vectors V, and W2 = U S V^T becomes the rows S
    V^T, without the rotation U, which leaves norms as they are.
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
    """Returns squares of the largest singular values (r,) of a matrix (m, n), and
    its right singular vectors (n, r).

    They come from its Gram matrix, in a sixth of the time of a singular value decomposition.
    """
    values, vectors = torch.linalg.eigh(weight.T @ weight)
    return values[-rank:], vectors[:, -rank:]
