"""Where a method cuts inside the language model, and to how many tokens, to spend a budget."""

from vlm_prune.vlm.errors import InputError

DEPTH = 32


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
    token.

    Raises:
        InputError: when the layers before the first cut alone exceed the budget.
    """
    ends = [*places[1:], layers]
    spans = [end - start for start, end in zip(places, ends, strict=True)]
    left = budget * layers - places[0] * tokens
    if left < 0:
        raise InputError(
            f"budget {budget} is below what the first {places[0]} of {layers} layers compute "
            f"({places[0] * tokens / layers:.0f} tokens per layer); give a larger budget"
        )
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
