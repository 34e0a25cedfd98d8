"""Methods made of other methods: one before and one inside the language model, or with merging."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from vlm_prune.kernels.pairwise_cosine import pairwise_cosine
from vlm_prune.pruning.adaptinfer import AdaptInfer
from vlm_prune.pruning.base import DecoderPruner, PositionRule, Pruner, Stage, VisionPruner
from vlm_prune.pruning.divprune import DivPrune
from vlm_prune.pruning.select import averaged, others
from vlm_prune.pruning.zoo import ZooExact
from vlm_prune.vlm.budget import Budget, tokens_for, widened
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.encoded import Images
from vlm_prune.vlm.families import Family, Need
from vlm_prune.vlm.layer_pruning import Cut, InsideModel
from vlm_prune.vlm.prompt_pruning import BeforeModel, Positions
from vlm_prune.vlm.tokens import DecoderTokens, Kept, VisionTokens, take


def check_before_model(method: object) -> None:
    """Raises `InputError` unless the method chooses tokens before the language model."""
    if not isinstance(method, VisionPruner) or method.stage == "input":
        raise InputError(
            f"{type(method).__name__} does not choose tokens before the language model; "
            "give a method that does, such as zoo-exact"
        )


def check_wrapped(method: VisionPruner) -> None:
    """Raises `InputError` unless what the method keeps can be changed by another one behind it."""
    check_before_model(method)
    if "videos" in method.needs:
        raise InputError(
            f"{type(method).__name__} compares the frames of a video, and this changes what is kept of "
            "each; give a method for images, such as divprune"
        )
    if method.changes_attention:
        raise InputError(
            f"{type(method).__name__} changes attention to what it keeps; name it last, as in "
            "divprune+restore"
        )


@dataclass
class Cascade(Pruner):
    """One method before the language model, then one inside it: `zoo-exact+adaptinfer`.

    `pre` keeps `widening` times the budget of each image, at most all tokens; `inside` then spends
    the budget as the mean over decoder layers of the tokens really computed. Where `positions` is
    `auto`, each part follows its own authors, `inside` from what `pre` made of the prompt.

    Args:
        pre: acts first; its own budget, positions and seed are replaced by the cascade's.
        inside: acts on what `pre` keeps, likewise.
        widening: tokens that enter the language model, as a multiple of the budget.
    """

    pre: VisionPruner = field(default_factory=ZooExact)
    inside: DecoderPruner = field(default_factory=AdaptInfer)
    widening: float = 2.0
    stage: ClassVar[Stage] = "decoder"
    authors_positions: ClassVar[PositionRule] = "as its parts"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_before_model(self.pre)
        if not isinstance(self.inside, DecoderPruner):
            raise InputError(
                f"{type(self.inside).__name__} does not act inside the language model; "
                "give a method that does, such as adaptinfer"
            )
        if self.widening < 1:
            raise InputError(f"widening {self.widening} is below 1; give 1 or more")

    @property
    def entering_budget(self) -> Budget:
        """Returns the budget of `pre`."""
        return widened(self.budget, self.widening)

    def entering(self, tokens: int, frames: int = 0) -> int:
        """Returns how many tokens of an image, or of a video of `frames`, enter the language model."""
        return tokens_for(self.entering_budget, tokens, frames)

    def cuts(
        self, tokens: int, layers: int, allowed: Sequence[int] = (), frames: int = 0
    ) -> list[Cut]:
        """Returns the cuts of `inside`, given the tokens of an image that `pre` leaves.

        Args:
            tokens: of an image.
            layers: of the decoder.
            allowed: as for `inside`.
            frames: of a video; 0 for an image.
        """
        # shares of the budget are shares of the whole image, not of what `pre` leaves
        inside = replace(self.inside, budget=tokens_for(self.budget, tokens, frames))
        return inside.cuts(self.entering(tokens, frames), layers, allowed)

    @property
    def needs(self) -> frozenset[Need]:
        return self.pre.needs | self.inside.needs

    def parts(
        self, family: Family, vision: Images | None
    ) -> tuple[BeforeModel | None, InsideModel | None]:
        layers, allowed = len(family.decoder.layers), self.inside.depths_on(family)
        cuts = partial(self.cuts, layers=layers, allowed=allowed)
        # a count where all images have one size, so that checks see it
        entering = self.entering_budget
        if isinstance(entering, int) and family.fixed_size:
            entering = self.entering(family.tokens_per_image)
        pre = replace(self.pre, budget=entering, positions=self.positions, seed=self.seed)
        inside = replace(self.inside, positions=self.positions, seed=self.seed)
        within = InsideModel(cuts, inside, inside.positions_on(family))
        return pre.before_model(family, vision), within


@dataclass
class MethodWrapper(VisionPruner):
    """A method before the language model, and something done about what it keeps: `divprune+merge`.

    Args:
        method: chooses the tokens; its own budget, positions and seed are replaced.
    """

    method: VisionPruner = field(default_factory=DivPrune)
    stage: ClassVar[Stage] = "projector"
    authors_positions: ClassVar[PositionRule] = "as its parts"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_wrapped(self.method)

    @classmethod
    def around(cls, method: Pruner) -> Pruner:
        """Returns the wrapper of a method."""
        return cls(method)  # type: ignore[arg-type]  # refused there in one line

    @property
    def needs(self) -> frozenset[Need]:
        return self.method.needs

    def positions_on(self, family: Family) -> Positions:
        if self.authors_positions != "as its parts":
            return super().positions_on(family)
        return replace(self.method, positions=self.positions).positions_on(family)

    def wrapped(self, budget: Budget) -> VisionPruner:
        """Returns the method with a budget, and with the wrapper's positions and seed."""
        return replace(self.method, budget=budget, positions=self.positions, seed=self.seed)


@dataclass
class Merge(MethodWrapper):
    """Any method before the language model, with each token that it drops averaged into the most
    similar kept one: `divprune+merge`. `merging` does so for a method inside it: `fastv+merge`.

    Args:
        method: chooses the tokens; its own budget, positions and seed are replaced.

    Similarity is the cosine of projected tokens; an average weighs all its tokens equally.
    """

    def reduce(self, vision: VisionTokens) -> Kept:
        kept = self.wrapped(self.budget).reduce(vision)
        return separately(kept, vision.projected, _merged)

    @classmethod
    def around(cls, method: Pruner) -> Pruner:
        """Returns a method with merging; in a cascade it is what `inside` drops that is merged."""
        if isinstance(method, Cascade):
            return replace(method, inside=merging(method.inside))
        if isinstance(method, DecoderPruner):
            return merging(method)
        return super().around(method)


def merging(method: DecoderPruner) -> DecoderPruner:
    """Returns the method with each token that a cut drops averaged into the most similar kept one.

    Hyperparameters are those of the method. Similarity is the cosine of hidden states at the cut.
    """
    kind = type(method)

    def reduce(self: DecoderPruner, tokens: DecoderTokens, keep: int) -> Kept:
        return _merged(kind.reduce(self, tokens, keep), tokens.features)

    merged: type[DecoderPruner] = type(f"{kind.__name__}Merge", (kind,), {"reduce": reduce})
    return merged(**{field.name: getattr(method, field.name) for field in fields(method)})


def separately(kept: Kept, tokens: Tensor, change: Callable[[Kept, Tensor], Kept]) -> Kept:
    """Returns what `change` makes of what was kept of `tokens`, one image after the other where they
    differ in number.

    Args:
        kept: of each image.
        tokens: (M, N, d).
        change: takes what was kept of some images, equally many tokens each, and their tokens.
    """
    # images that keep equally many go together, others one by one
    if len({len(indices) for indices in kept.indices}) < 2:
        return change(kept, tokens)
    parts = [
        change(Kept([indices], [features]), image_tokens[None])
        for indices, features, image_tokens in zip(kept.indices, kept.features, tokens, strict=True)
    ]
    return Kept(
        [part.indices[0] for part in parts],
        [part.features[0] for part in parts],
        None if parts[0].sizes is None else [part.sizes[0] for part in parts if part.sizes],
    )


def _merged(kept: Kept, tokens: Tensor) -> Kept:
    """Returns what was kept of `tokens` (M, N, d) with the rest averaged into it."""
    features = torch.stack(kept.features)
    if features.shape[1] == 0:
        return kept
    dropped = take(tokens, others(torch.stack(kept.indices), tokens.shape[1]))
    nearest = pairwise_cosine(dropped, features).argmax(-1)
    return Kept(kept.indices, list(averaged(features, dropped, nearest)))
