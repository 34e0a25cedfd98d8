"""AdaptInfer: pruning inside the language model, guided by its changing view of the text."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlm_prune.kernels.text_guided_score import text_guided_score
from vlm_prune.pruning.base import CountedTokens, DecoderScorePruner
from vlm_prune.vlm.common.registry import Registry
from vlm_prune.vlm.tokens import DecoderTokens


@dataclass
class AdaptInfer(DecoderScorePruner):
    """Three cuts inside the decoder, each scored by text-to-vision attention weighted by how much
    each text token matters to the text.

    https://arxiv.org/abs/2508.06084

    Args:
        preset: the authors' token counts after layers 2, 11 and 21 by name (`64`, `128`, ...)
            instead of counts solved from `budget`.

    The authors state budgets with the counts after a cut already at the cutting layer, so that their
    `64` computes a mean of 83 tokens on 32 layers; here the budget is the mean that is computed.
    """

    counted: ClassVar[CountedTokens] = "at the cut"
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
        rows = tokens.question_rows(slice(None))
        scores = text_guided_score(
            rows.query, rows.key, rows.columns, rows.key_valid, rows.scale, rows.window
        )
        return scores.gather(1, rows.image)
