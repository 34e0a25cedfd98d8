"""Where a method cuts inside the language model, and to how many tokens, to spend a budget."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import msgspec

from vlm_prune.vlm.common.errors import InputError, first_line
from vlm_prune.vlm.common.files import read_object

DEPTH = 32


@dataclass(frozen=True)
class Schedule:
    """Cuts found on a model, instead of those of a method's paper.

    Args:
        layers: decoder layers of that model.
        places: how many of them have run at each cut, ascending.
        shares: relative number of tokens after each cut, not rising.

    Raises:
        InputError: if these do not go together.
    """

    layers: int
    places: tuple[int, ...]
    shares: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "places", tuple(self.places))
        object.__setattr__(self, "shares", tuple(self.shares))
        if not (
            len(self.places) == len(self.shares) > 0
            and list(self.places) == sorted(set(self.places))
            and 0 <= self.places[0]
            and self.places[-1] < self.layers
            and list(self.shares) == sorted(self.shares, reverse=True)
            and self.shares[-1] > 0
            and all(map(math.isfinite, self.shares))
        ):
            raise InputError(
                f"a schedule needs rising places below its {self.layers} layers and as many shares "
                f"above 0 that do not rise, not {list(self.places)} and {list(self.shares)}"
            )

    @classmethod
    def read(cls, path: str | Path) -> "Schedule":
        """Reads the schedule from a JSON file that
        `vlm-prune schedule` wrote; raises `InputError`.
        """
        return cls.of(read_object(Path(path)), f"{path} holds no schedule")

    @classmethod
    def of(cls, content: Mapping[str, Any], wrong: str = "no schedule") -> "Schedule":
        """Reads the schedule from plain values; other values are evidence for it and ignored.

        Raises:
            InputError: beginning with `wrong`, if its parts are not there or of another kind.
        """
        names = [field.name for field in fields(cls)]
        try:
            if missing := [name for name in names if name not in content]:
                raise ValueError(f"no {missing[0]}")
            return msgspec.convert({name: content[name] for name in names}, cls)
        except ValueError as error:
            advice = "give the schedule.json of vlm-prune schedule"
            raise InputError(f"{wrong} ({first_line(error)}); {advice}") from error

    def scaled(self, layers: int) -> list[int]:
        """Returns after how many layers the cuts come in a model of `layers` layers."""
        return [round(depth * layers / self.layers) for depth in self.places]


def check_layer(layer: int) -> None:
    """Raises `InputError` unless `layer` of 32 layers can have run before a cut."""
    if not 0 <= layer < DEPTH:
        raise InputError(f"layer {layer} is out of range; give 0 to {DEPTH - 1}, of {DEPTH}")


def entering(layer: int) -> float:
    """Returns the tokens before a cut after `layer` of 32 layers, as a multiple
    of the mean over all layers.

    The cut leaves a third: ApET's counts, 96 and 32 for a mean of 64 at layer 16.
    """
    # x tokens in `share` of the layers and x / 3 in the others have a mean of 1
    share = layer / DEPTH
    return 1 / (share + (1 - share) / 3)


def scaled(depths: list[int], layers: int) -> list[int]:
    """Returns cuts that are stated for 32 decoder layers for a model of `layers` layers."""
    return [round(depth * layers / DEPTH) for depth in depths]


def nearest(depths: list[int], allowed: Sequence[int], layers: int) -> list[int]:
    """Returns each of the cuts at the nearest place where one is allowed, of two at the first.

    Args:
        depths: how many layers have run at each cut; those behind the last layer stay there.
        allowed: where cuts can be, ascending.
        layers: of the decoder.
    """
    return [
        depth if depth >= layers else min(allowed, key=lambda other: abs(other - depth))
        for depth in depths
    ]


def fit_cuts(
    budget: int,
    tokens: int,
    layers: int,
    depths: list[int],
    shares: list[float],
    allowed: Sequence[int] = (),
) -> tuple[list[int], list[int]]:
    """Returns where to cut and the counts after each cut whose mean over `layers` is `budget`.

    Where the layers before the first cut would leave less than one token for each layer after it,
    that cut moves up, at most to the input of the first layer.

    Args:
        budget: mean number of image tokens that a layer computes, 1 to `tokens`.
        tokens: image tokens that enter the first layer.
        layers: decoder layers.
        depths: how many layers have run at each cut, ascending.
        shares: relative number of tokens after each cut, not rising.
        allowed: where cuts can be, ascending; anywhere unless given.

    Raises:
        InputError: if the layers before the first place where a cut can be spend the budget.
    """
    allowed = [depth for depth in allowed or range(layers) if depth <= depths[0]]
    first = allowed.pop()
    # all tokens before the first cut and one in each layer after it must fit
    while first * tokens + layers - first > budget * layers:
        if not allowed:
            least = math.ceil((first * tokens + layers - first) / layers)
            raise InputError(
                f"a budget of {budget} of {tokens} tokens is spent before layer {first} of {layers}, "
                f"where this model can first be cut; give {least} or more, or a method before the "
                "language model, such as divprune"
            )
        first = allowed.pop()
    depths = [first, *depths[1:]]
    return depths, solve_counts(budget, tokens, layers, depths, shares)


def solve_counts(
    budget: int, tokens: int, layers: int, depths: list[int], shares: list[float]
) -> list[int]:
    """Returns the counts after each cut, proportional to `shares` and at least 1.

    They spend `budget` x `layers`: what rounding leaves goes to the earliest segments first, so the
    mean is off by less than one token. `fit_cuts` sees to it that the layers before the first cut
    leave enough for the others.

    Args:
        budget: mean number of image tokens that a layer computes.
        tokens: image tokens that enter the first layer.
        layers: decoder layers.
        depths: how many layers have run at each cut, ascending.
        shares: relative number of tokens after each cut, not rising.
    """
    # how many layers run between a cut and the next, and what they may compute together
    ends = [*depths[1:], layers]
    spans = [end - start for start, end in zip(depths, ends, strict=True)]
    left = budget * layers - depths[0] * tokens

    def counts_at(scale: float) -> list[int]:
        return [min(tokens, max(1, int(scale * share))) for share in shares]

    def spent_by(counts: list[int]) -> int:
        return sum(span * count for span, count in zip(spans, counts, strict=True))

    # by bisection, the largest common scale of the shares that can be paid
    low, high = 0.0, tokens / shares[-1] + 1
    for _ in range(60):
        scale = (low + high) / 2
        low, high = (scale, high) if spent_by(counts_at(scale)) <= left else (low, scale)
    counts = counts_at(low)
    # a segment takes what is left in whole tokens, never more than the segment before it has
    left -= spent_by(counts)
    for segment, span in enumerate(spans):
        ceiling = tokens if segment == 0 else counts[segment - 1]
        extra = min(left // span, ceiling - counts[segment]) if span else 0
        counts[segment] += extra
        left -= extra * span
    return counts
