"""The images of a prompt after the vision tower, in groups that share a shape."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from vlm_prune.vlm.tokens import Kept, VisionTokens

T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """Images of equal shape: the unit that a pruner sees.

    Args:
        members: which images of the prompt they are, M of them.
        tokens: theirs, N each.
        places: where the N tokens stand among an image's placeholders, (N,); None where they are
            all of them.
        spare: features of the other placeholders in their order, (M, R, d_l): newlines, behind
            which there are no pixels. They are the first to go: kept only with all N tokens.
        deepstack: features that decoder layers add to the N tokens, (M, N, d_l) for each layer.
        flops: what the tower spent on one of the images.
    """

    members: list[int]
    tokens: VisionTokens
    places: Tensor | None = None
    spare: Tensor | None = None
    deepstack: list[Tensor] = field(default_factory=list)
    flops: float = 0.0

    @property
    def size(self) -> int:
        """N."""
        return self.tokens.projected.shape[1]

    @property
    def grid(self) -> tuple[int, int] | None:
        """The one grid that all placeholders of an image are, None where there are others."""
        (rows, columns), *others = self.tokens.grids
        alone = not others and rows * columns == self.tokens.available
        return (rows, columns) if alone else None

    def standing(self, places: Tensor) -> Tensor:
        """Where tokens stand among the placeholders; all N bring the spare ones with them."""
        if self.places is None:
            return places
        if len(places) == self.size:
            return torch.arange(self.tokens.available, device=places.device)
        return self.places[places]

    def filled(self, image: int, features: Tensor) -> Tensor:
        """All placeholders' features, given those (N, d_l) of one member's tokens."""
        if self.places is None or self.spare is None:
            return features
        whole = features.new_empty(self.tokens.available, features.shape[1])
        free = torch.ones(len(whole), dtype=torch.bool, device=whole.device)
        free[self.places] = False
        whole[self.places], whole[free] = features, self.spare[image]
        return whole


@dataclass(frozen=True)
class Images:
    """All images of a prompt, encoded.

    Args:
        groups: they together hold every image once.
        inputs: arguments that say how the images lie, as the model's processor gave them.
    """

    groups: list[Group]
    inputs: dict[str, Tensor] = field(default_factory=dict)

    @property
    def counts(self) -> list[int]:
        """Placeholders of each image."""
        return self._in_order([[g.tokens.available] * len(g.members) for g in self.groups])

    @property
    def grids(self) -> list[tuple[int, int] | None]:
        """Rows and columns of each image whose placeholders are one grid over it in reading order."""
        return self._in_order([[g.grid] * len(g.members) for g in self.groups])

    @property
    def flops(self) -> list[float]:
        """Matrix-product FLOPs of the tower for each image."""
        return self._in_order([[g.flops] * len(g.members) for g in self.groups])

    @property
    def projected(self) -> list[Tensor]:
        """Features of each image as the unpruned model gets them, (n_i, d_l)."""
        return self._in_order(
            [[g.filled(i, own) for i, own in enumerate(g.tokens.projected)] for g in self.groups]
        )

    @property
    def deepstack(self) -> list[list[Tensor]]:
        """For each layer the features added to each image's tokens."""
        layers = zip(*(group.deepstack for group in self.groups), strict=True)
        return [self._in_order([list(part) for part in layer]) for layer in layers]

    def reduce(self, reduce: Callable[[Group], Kept]) -> tuple[Kept, list[list[Tensor]]]:
        """What a pruner keeps: places among the placeholders and features, and the deepstack's."""
        reduced = [reduce(group) for group in self.groups]
        both = list(zip(self.groups, reduced, strict=True))
        layers = zip(*(group.deepstack for group in self.groups), strict=True)
        return (
            Kept(
                self._in_order([[g.standing(at) for at in kept.indices] for g, kept in both]),
                self._in_order(
                    [
                        [
                            g.filled(i, f) if len(f) == g.size else f
                            for i, f in enumerate(k.features)
                        ]
                        for g, k in both
                    ]
                ),
            ),
            [
                self._in_order(
                    [
                        [own[at] for own, at in zip(part, kept.indices, strict=True)]
                        for part, kept in zip(layer, reduced, strict=True)
                    ]
                )
                for layer in layers
            ],
        )

    def _in_order(self, per_group: Sequence[Sequence[T]]) -> list[T]:
        found = {
            image: value
            for group, values in zip(self.groups, per_group, strict=True)
            for image, value in zip(group.members, values, strict=True)
        }
        return [found[image] for image in sorted(found)]
