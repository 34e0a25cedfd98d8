"""AdaptInfer: pruning inside the language model, guided by its changing view of the text."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlm_prune.pruning.base import DecoderPruner
from vlm_prune.vlm.errors import InputError
from vlm_prune.vlm.midstack import Cut
from vlm_prune.vlm.registry import Registry
from vlm_prune.vlm.tokens import tokens_for

PRESETS: Registry[tuple[int, int, int]] = Registry(
    "preset",
    {
        "128": (290, 72, 18),
        "64": (133, 27, 3),
        "48": (80, 24, 2),
        "32": (40, 12, 0),
        "128-13b": (300, 94, 30),
        "64-13b": (148, 40, 5),
    },
)
_PATTERN = (2, 11, 21)
_DEPTH = 32
_SHARES = (133, 27, 3)


@dataclass
class AdaptInfer(DecoderPruner):
    """Three cuts inside the decoder, each scored by text-to-vision attention weighted by how much
    each text token matters to the text.

    https://arxiv.org/abs/2508.06084

    Args:
        preset: the authors' token counts after layers 2, 11 and 21 by name (`64`, `128`, ...)
            instead of counts solved from `budget`.

    The authors state budgets with the counts after a cut already at the cutting layer; here the
    budget is the mean over layers of the image tokens really computed, which is about 18 tokens
    fewer on 32 layers. Cuts stand where 2, 11 and 21 of 32 layers have run, scaled to the model's
    depth. Where the layers before the first cut alone exceed the budget, that cut moves up, at
    most to the input of the first layer, which then supplies the scores itself.
    """

    preset: str = ""
    paper: ClassVar[str] = "https://arxiv.org/abs/2508.06084"

    def cuts(self, tokens: int, layers: int) -> list[Cut]:
        places = [round(place * layers / _DEPTH) for place in _PATTERN]
        if self.preset:
            counts = PRESETS[self.preset]
        else:
            budget = tokens_for(self.budget, tokens)
            while places[0] > 0 and places[0] * tokens >= budget * layers and budget < tokens:
                places[0] -= 1
            counts = solve(budget, tokens, layers, places)
        return [Cut(p, min(n, tokens)) for p, n in zip(places, counts, strict=True) if p < layers]

    def score(self, to_text: Tensor, to_vision: Tensor) -> Tensor:
        """s[v] = sum over heads and text j of p_h[j] A_h[j, v], p = column sums of the symmetrised
        text-to-text attention A + A^T - diag(A)."""
        diagonal = to_text.diagonal(dim1=-2, dim2=-1)
        prior = to_text.sum(-2) + to_text.sum(-1) - diagonal
        return (prior[..., None] * to_vision).sum(dim=(1, 2))


def solve(budget: int, tokens: int, layers: int, places: list[int]) -> tuple[int, int, int]:
    """Counts after the three cuts, in the authors' proportions, that spend `budget` x `layers`.

    What rounding leaves goes to the latest segments first, so the mean is off by less than one
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
    low, high = 0.0, tokens / _SHARES[-1] + 1
    for _ in range(60):
        scale = (low + high) / 2
        spent = sum(s * min(tokens, int(scale * w)) for s, w in zip(spans, _SHARES, strict=True))
        low, high = (scale, high) if spent <= left else (low, scale)
    counts = [min(tokens, int(low * share)) for share in _SHARES]
    left -= sum(span * count for span, count in zip(spans, counts, strict=True))
    for segment in (0, 1, 2):
        ceiling = tokens if segment == 0 else counts[segment - 1]
        extra = min(left // spans[segment], ceiling - counts[segment]) if spans[segment] else 0
        counts[segment] += extra
        left -= extra * spans[segment]
    return counts[0], counts[1], counts[2]
