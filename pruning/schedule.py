"""Where a method cuts inside the language model, and to how many tokens, to spend a budget."""

import json
from dataclasses import dataclass
from pathlib import Path

from vlm_prune.vlm.common.errors import InputError

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
        ):
            raise InputError(
                f"a schedule needs rising places below its {self.layers} layers and as many shares "
                f"above 0 that do not rise, not {list(self.places)} and {list(self.shares)}"
            )

    @classmethod
    def read(cls, path: str | Path) -> "Schedule":
        """The schedule in a JSON file that `vlm-prune schedule` wrote; raises `InputError`."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(*(content[key] for key in ("layers", "places", "shares")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} holds no schedule ({type(error).__name__}: {error}); "
                "give the schedule.json of vlm-prune schedule"
            ) from error

    def scaled(self, layers: int) -> list[int]:
        """Its places in a model of another depth."""
        return [round(place * layers / self.layers) for place in self.places]


def check_layer(layer: int) -> None:
    """Raises `InputError` unless `layer` of 32 layers can have run before a cut."""
    if not 0 <= layer < DEPTH:
        raise InputError(f"layer {layer} is out of range; give 0 to {DEPTH - 1}, of {DEPTH}")


def scaled(places: list[int], layers: int) -> list[int]:
    """Cuts stated for 32 decoder layers, for a model of another depth."""
    return [round(place * layers / DEPTH) for place in places]


def fit(
    budget: int, tokens: int, layers: int, places: list[int], shares: list[float]
) -> tuple[list[int], list[int]]:
    """Places and counts of cuts whose mean over `layers` of the tokens computed is `budget`.

    Where the layers before the first cut alone would spend the budget, that cut moves up, at most
    to the input of the first layer.
    """
    first = places[0]
    while first > 0 and first * tokens >= budget * layers and budget < tokens:
        first -= 1
    places = [first, *places[1:]]
    return places, solve(budget, tokens, layers, places, shares)


def solve(
    budget: int, tokens: int, layers: int, places: list[int], shares: list[float]
) -> list[int]:
    """Counts after each cut, proportional to `shares`, that spend `budget` x `layers`.

    What rounding leaves goes to the earliest segments first, so the mean is off by less than one
    token. The layers before the first cut must not exceed the budget; `fit` sees to it.
    """
    ends = [*places[1:], layers]
    spans = [end - start for start, end in zip(places, ends, strict=True)]
    left = budget * layers - places[0] * tokens
    low, high = 0.0, tokens / shares[-1] + 1
    for _ in range(60):
        scale = (low + high) / 2
        spent = sum(s * min(tokens, int(scale * w)) for s, w in zip(spans, shares, strict=True))
        low, high = (scale, high) if spent <= left else (low, scale)
    counts = [min(tokens, int(low * share)) for share in shares]
    left -= sum(span * count for span, count in zip(spans, counts, strict=True))
    for segment, span in enumerate(spans):
        ceiling = tokens if segment == 0 else counts[segment - 1]
        extra = min(left // span, ceiling - counts[segment]) if span else 0
        counts[segment] += extra
        left -= extra * span
    return counts
