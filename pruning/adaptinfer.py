"""AdaptInfer: pruning inside the language model, guided by its changing view of the text."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlm_prune.pruning.base import DecoderScorePruner
from vlm_prune.vlm.registry import Registry
from vlm_prune.vlm.tokens import DecoderTokens


@dataclass
class AdaptInfer(DecoderScorePruner):
    """Three cuts inside the decoder, each scored by text-to-vision attention weighted by how much
    each text token matters to the text.

    https://arxiv.org/abs/2508.06084

    Args:
        preset: the authors' token counts after layers 2, 11 and 21 by name (`64`, `128`, ...)
            instead of counts solved from `budget`.

    The authors state budgets with the counts after a cut already at the cutting layer; here the
    budget is the mean over layers of the image tokens really computed, which is about 18 tokens
    fewer on 32 layers.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2508.06084"
    presets: ClassVar[Registry[tuple[float, ...]]] = Registry(
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

    def pattern(self) -> list[tuple[int, float]]:
        return [(2, 133), (11, 27), (21, 3)]

    def score(self, tokens: DecoderTokens) -> Tensor:
        to_vision, to_text = tokens.attention(slice(None))
        return weighted_by_text(to_text, to_vision)


def weighted_by_text(to_text: Tensor, to_vision: Tensor) -> Tensor:
    """s[v] = sum over heads and text j of p_h[j] A_h[j, v], p = column sums of the symmetrised
    text-to-text attention A + A^T - diag(A).

    Shapes: (M, H, T, T), (M, H, T, n) -> (M, n).
    """
    diagonal = to_text.diagonal(dim1=-2, dim2=-1)
    prior = to_text.sum(-2) + to_text.sum(-1) - diagonal
    return (prior[..., None] * to_vision).sum(dim=(1, 2))
