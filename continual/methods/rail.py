"""RAIL-Primal: a closed-form classifier on frozen features, zero-shot for unseen classes."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from vlm_prune.continual.config import above, within
from vlm_prune.continual.delta import Delta
from vlm_prune.continual.methods.base import Context, Method, ParameterGroup, Space


def ridge(gram: Tensor, cross: Tensor, strength: float) -> Tensor:
    """Returns the weights (h, C) that minimize |X W - Y|² + strength |W|².

    Args:
        gram: X'X, (h, h).
        cross: X'Y, (h, C).
        strength: of the penalty.
    """
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.cholesky_solve(cross, torch.linalg.cholesky(gram + strength * eye))


@dataclass
class RAIL(Method):
    """Ridge regression of one-hot labels on randomly expanded image features, over all tasks.

    https://arxiv.org/abs/2406.18868

    CLIP stays frozen. An image whose zero-shot class belongs to no task learned so far keeps its
    zero-shot scores; otherwise ridge and zero-shot scores over the learned classes are mixed. The
    paper updates the solution recursively; the same solution comes here from the summed X'X and
    X'Y in float64. Mixing probabilities of CLIP with the regression's output is our reading.

    Args:
        width: of the random hidden layer.
        strength: of the ridge penalty.
        mix: share of the ridge scores among the learned classes.
    """

    name: ClassVar[str] = "rail"
    width: int = 4096
    strength: float = 1.0
    mix: float = 0.8
    _gram: Tensor | None = field(default=None, init=False, repr=False)
    _cross: list[Tensor] = field(default_factory=list, init=False, repr=False)
    _weights: Tensor | None = field(default=None, init=False, repr=False)
    _seed: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        above("width", self.width, 1)
        above("strength", self.strength, 0, strict=True)
        within("mix", self.mix)

    def begin_task(self, context: Context) -> list[ParameterGroup]:
        self.start(context)
        context.clip.model.requires_grad_(False)
        self._seed = context.recipe.seed
        device, classes = context.clip.device, len(context.ids)
        if self._gram is None:
            self._gram = torch.zeros(self.width, self.width, dtype=torch.float64, device=device)
        cross = torch.zeros(self.width, classes, dtype=torch.float64, device=device)
        with torch.no_grad():
            for pixels, labels in context.train():
                hidden = self.expand(context.clip.encode_image(pixels))
                # sums over all images so far are all that a ridge regression needs
                self._gram += hidden.T @ hidden
                targets = torch.nn.functional.one_hot(labels, classes).to(hidden.dtype)
                cross += hidden.T @ targets
        self._cross.append(cross)
        self._weights = None
        return []

    def end_task(self) -> Delta | None:
        return None

    def added_parameters(self) -> int:
        """Returns the number of the random map's and the regression's weights."""
        inputs = self.context.encode(self.context.ids[:1]).shape[1]
        return self.width * (inputs + sum(cross.shape[1] for cross in self._cross))

    def added_bytes(self) -> int:
        """Returns the bytes of the random map, in float32, and of the regression, in float64."""
        return 4 * self.added_parameters() + 4 * self.width * sum(c.shape[1] for c in self._cross)

    def expand(self, features: Tensor) -> Tensor:
        """Returns relu of a fixed random map: (M, d) to (M, width), float64."""
        generator = torch.Generator().manual_seed(self._seed)
        weight = torch.randn(features.shape[1], self.width, generator=generator)
        return (features @ weight.to(features.device)).relu().double()

    def scores(self, features: Tensor, logits: Tensor, space: Space) -> Tensor:
        if not self._cross or self._gram is None:
            return logits
        if self._weights is None:
            cross = torch.cat(self._cross, 1)
            self._weights = ridge(self._gram, cross, self.strength)
        learned = space.task < len(self._cross)
        if not learned.any():
            return logits
        # the regression's columns are the classes of the tasks learned, one task after the other
        offsets = torch.tensor([0, *(c.shape[1] for c in self._cross)]).cumsum(0).to(space.task)
        columns = offsets[space.task[learned]] + space.label[learned]
        fitted = (self.expand(features) @ self._weights[:, columns]).float()
        # both answer among learned classes; where CLIP alone finds another class, CLIP decides
        mixed = logits.new_full(logits.shape, -torch.inf)
        clip = logits[:, learned].softmax(-1)
        mixed[:, learned] = (1 - self.mix) * clip + self.mix * fitted
        return mixed.where(learned[logits.argmax(1)][:, None], logits)

    def state(self) -> dict[str, Tensor]:
        if self._gram is None:
            return {}
        fixed = {"gram": self._gram, "seed": torch.tensor(self._seed)}
        return fixed | {f"cross-{n}": cross for n, cross in enumerate(self._cross)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        if state:
            self._gram, self._seed = state["gram"], int(state["seed"])
        self._weights = None
        self._cross = [state[f"cross-{n}"] for n in range(len(state) - 2)]
