"""The images and videos of a prompt after the vision tower, in groups that share a shape."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self, TypeVar

import torch
from torch import Tensor

from vlm_prune.vlm.tokens import VisionTokens

T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """Images, or videos, of equal shape: the unit that a pruner sees.

    Args:
        members: which images of the prompt they are, M of them.
        tokens: theirs, N each.
        indices: of the N tokens among an image's placeholders, (N,); None where they are all of
            them.
        newlines: features of the other placeholders in their order, (M, R, d_l), behind which there
            are no pixels. They are the first to go: kept only with all N tokens.
        deepstack: features that decoder layers add to the N tokens, (M, N, d_l) for each layer.
        flops: what the tower spent on one of the images.
    """

    members: list[int]
    tokens: VisionTokens
    indices: Tensor | None = None
    newlines: Tensor | None = None
    deepstack: list[Tensor] = field(default_factory=list)
    flops: float = 0.0

    @property
    def size(self) -> int:
        """Returns N, the tokens of an image."""
        return self.tokens.projected.shape[1]

    @property
    def grid(self) -> tuple[int, int] | None:
        """Returns the grid that an image's placeholders fill in reading order; None
        where they are more than one grid.
        """
        (rows, columns), *others = self.tokens.grids
        alone = not others and rows * columns == self.tokens.available
        return (rows, columns) if alone else None

    def placeholders(self, indices: Tensor) -> Tensor:
        """Returns indices (k,) among the placeholders, given those of tokens; all N
        bring the newlines with them.
        """
        if self.indices is None:
            return indices
        if len(indices) == self.size:
            return torch.arange(self.tokens.available, device=indices.device)
        return self.indices[indices]

    def filled(self, image: int, features: Tensor) -> Tensor:
        """Returns all placeholders' features, given those (N, d_l) of one member's tokens."""
        if self.indices is None or self.newlines is None:
            return features
        # tokens where `indices` says, newlines in all other places
        whole = features.new_empty(self.tokens.available, features.shape[1])
        free = torch.ones(len(whole), dtype=torch.bool, device=whole.device)
        free[self.indices] = False
        whole[self.indices], whole[free] = features, self.newlines[image]
        return whole

    def alone(self, image: int, visible: Tensor) -> "Group":
        """Returns one member without its masked placeholders, given which are `visible`, (n,).

        Where some are masked the others no longer fill a grid: to methods they are one row.
        """
        visible = visible.to(self.tokens.projected.device)
        chosen, indices = visible, None
        if self.indices is not None:
            # tokens among the placeholders, then their indices among the visible ones
            chosen = visible[self.indices]
            indices = (visible.cumsum(0) - 1)[self.indices[chosen]]
        newlines = self.newlines
        if newlines is not None and self.indices is not None:
            # newlines that are left, of all placeholders that are no tokens
            free = torch.ones_like(visible)
            free[self.indices] = False
            newlines = newlines[image : image + 1, visible[free]]
        tokens = self.tokens.of(image, chosen)
        if not bool(visible.all()):
            grids = ((1, int(chosen.sum())),)
            tokens = replace(tokens, grids=grids, available=int(visible.sum()))
        return Group(
            [self.members[image]],
            tokens,
            indices,
            newlines,
            [layer[image : image + 1, chosen] for layer in self.deepstack],
            self.flops,
        )


@dataclass(frozen=True)
class Images:
    """All images of a prompt, encoded; its videos follow them.

    Args:
        groups: they together hold every image once.
        inputs: arguments that say how the images lie, as the model's processor gave them.
    """

    groups: list[Group]
    inputs: dict[str, Tensor] = field(default_factory=dict)

    def followed_by(self, videos: Self) -> Self:
        """Returns these images and then those videos, as one."""
        # videos are numbered behind the images
        first = sum(len(group.members) for group in self.groups)
        later = [
            replace(g, members=[first + member for member in g.members]) for g in videos.groups
        ]
        return replace(self, groups=self.groups + later, inputs=self.inputs | videos.inputs)

    @property
    def frames(self) -> list[int]:
        """Returns the number of frames of each video, 0 for images."""
        return self._in_order([[g.tokens.frames] * len(g.members) for g in self.groups])

    @property
    def counts(self) -> list[int]:
        """Returns the number of placeholders of each image."""
        return self._in_order([[g.tokens.available] * len(g.members) for g in self.groups])

    @property
    def grids(self) -> list[tuple[int, int] | None]:
        """Returns rows and columns of each image whose placeholders are one grid
        over it in reading order, else None.
        """
        return self._in_order([[g.grid] * len(g.members) for g in self.groups])

    @property
    def video_grids(self) -> list[tuple[int, int, int] | None]:
        """Returns frames, rows and columns of each video; None for images."""
        found = [
            (g.tokens.frames, *g.tokens.grids[0]) if g.tokens.frames else None for g in self.groups
        ]
        return self._in_order(
            [[grid] * len(g.members) for grid, g in zip(found, self.groups, strict=True)]
        )

    @property
    def flops(self) -> list[float]:
        """Returns the matrix-product FLOPs of the tower for each image."""
        return self._in_order([[g.flops] * len(g.members) for g in self.groups])

    @property
    def projected(self) -> list[Tensor]:
        """Returns the features of each image as the unpruned model gets them, (n_i, d_l)."""
        return self._in_order(
            [[g.filled(i, rows) for i, rows in enumerate(g.tokens.projected)] for g in self.groups]
        )

    @property
    def deepstack(self) -> list[list[Tensor]]:
        """Returns for each layer the features added to each image's tokens, (N, d_l) each."""
        layers = zip(*(group.deepstack for group in self.groups), strict=True)
        return [self._in_order([list(part) for part in layer]) for layer in layers]

    def visible(self, masks: Sequence[Tensor]) -> list[Group]:
        """Returns groups of the images without masked placeholders; images that
        are wholly masked are left out.

        `masks` (n_i,) says of each image which of its placeholders are not masked.
        """
        groups = []
        for group in self.groups:
            if all(bool(masks[image].all()) for image in group.members):
                groups.append(group)
                continue
            single = [
                group.alone(number, masks[image]) for number, image in enumerate(group.members)
            ]
            groups += [one for one in single if one.size]
        return groups

    def _in_order(self, per_group: Sequence[Sequence[T]]) -> list[T]:
        # groups hold images of one size: back to the order of the prompt
        found = {
            image: value
            for group, values in zip(self.groups, per_group, strict=True)
            for image, value in zip(group.members, values, strict=True)
        }
        return [found[image] for image in sorted(found)]
