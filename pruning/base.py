"""What a pruner is: a dataclass of hyperparameters, applied to a model as a context manager."""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor

from vlm_prune.vlm import midstack, session
from vlm_prune.vlm.errors import InputError
from vlm_prune.vlm.families import family_of
from vlm_prune.vlm.midstack import Cut
from vlm_prune.vlm.registry import unknown
from vlm_prune.vlm.session import Positions
from vlm_prune.vlm.tokens import Kept, Trace, VisionTokens, check_budget, tokens_for, top

Stage = Literal["input", "encoder", "projector", "decoder"]


@dataclass
class Pruner(ABC):
    """Keep part of an image's tokens.

    `with pruner(model) as trace:` prunes every `generate` and forward inside the block and leaves
    the model as it was. `trace` says what was kept.

    Args:
        budget: image tokens kept per image, or a fraction of them in (0, 1].
        positions: what kept tokens' positions become: `contiguous` renumbers them, as all the
            papers do; `original` keeps the gaps; `auto` is contiguous for one-dimensional
            positions.
        seed: for methods that draw random numbers; the same seed keeps the same tokens in any
            batch.

    Raises:
        InputError: if a hyperparameter is out of range.
    """

    budget: int | float = 64
    positions: Positions = "auto"
    seed: int = 0

    stage: ClassVar[Stage]
    paper: ClassVar[str] = ""

    def __post_init__(self) -> None:
        check_budget(self.budget)
        self._choice("positions", get_args(Positions))

    def _choice(self, name: str, allowed: tuple[str, ...]) -> None:
        if getattr(self, name) not in allowed:
            raise InputError(unknown(name, str(getattr(self, name)), allowed))

    @abstractmethod
    def __call__(
        self, model: Any, vision: VisionTokens | None = None
    ) -> AbstractContextManager[Trace]:
        """Prune `model` inside a `with` block.

        `vision` holds the prompt's images where they were encoded beforehand; `generate` then gets
        them as `mm_encoder_outputs` instead of pixels.
        """

    def check(self, tokens: int, layers: int) -> None:
        """Raises `InputError` when the budget cannot be met on such a model."""
        tokens_for(self.budget, tokens)


@dataclass
class VisionPruner(Pruner):
    """Acts before the language model: reduces each image's tokens to exactly the budget."""

    @abstractmethod
    def reduce(self, vision: VisionTokens) -> Kept:
        """Choose or merge tokens."""

    def pixels(self, pixel_values: Tensor) -> Tensor:
        """Change the images before the tower sees them; (M, 3, H, W) -> (M, 3, H', W')."""
        return pixel_values

    def count(self, vision: VisionTokens) -> int:
        """Tokens to keep of each image."""
        return tokens_for(self.budget, vision.projected.shape[1])

    def __call__(
        self, model: Any, vision: VisionTokens | None = None
    ) -> AbstractContextManager[Trace]:
        return session.pruned(model, self.reduce, self.positions, self.pixels, vision)


@dataclass
class ScorePruner(VisionPruner):
    """Keeps the tokens with the highest scores, in their original order."""

    @abstractmethod
    def score(self, vision: VisionTokens) -> Tensor:
        """(M, N); higher is kept."""

    def reduce(self, vision: VisionTokens) -> Kept:
        return Kept.at(vision, top(self.score(vision), self.count(vision)))


@dataclass
class DecoderPruner(Pruner):
    """Acts inside the language model; the budget is the mean over layers of tokens computed."""

    stage: ClassVar[Stage] = "decoder"

    @abstractmethod
    def cuts(self, tokens: int, layers: int) -> list[Cut]:
        """Where to cut, and to how many tokens, for images of `tokens` in `layers` layers."""

    @abstractmethod
    def score(self, to_text: Tensor, to_vision: Tensor) -> Tensor:
        """(B, H, T, T) and (B, H, T, L) attention of the text rows -> (B, L)."""

    def check(self, tokens: int, layers: int) -> None:
        self.cuts(tokens, layers)

    def __call__(
        self, model: Any, vision: VisionTokens | None = None
    ) -> AbstractContextManager[Trace]:
        family = family_of(model)
        cuts = self.cuts(family.tokens_per_image, len(family.decoder.layers))
        return midstack.pruned(model, cuts, self.score, self.positions)
