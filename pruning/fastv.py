"""FastV: an image is worth half its tokens after the second layer."""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import Tensor

from vlm_prune.pruning.base import DecoderScorePruner, PositionRule
from vlm_prune.pruning.received import from_rows, in_decoder
from vlm_prune.pruning.schedule import check_layer
from vlm_prune.vlm.common.registry import Registry
from vlm_prune.vlm.tokens import DecoderTokens

Readers = Literal["all", "last"]


@dataclass
class FastV(DecoderScorePruner):
    """Drop image tokens that receive little attention after an early decoder layer.

    https://arxiv.org/abs/2403.06764

    Args:
        preset: the paper's ratios by name instead of a count solved from `budget`: `r50` keeps half
            the tokens, `r75` a quarter.
        layer: K, the 1-based decoder layer (of 32) whose attention is read; its output is pruned.
        queries: `all` averages the attention that a token receives from every token of the prompt,
            as the paper defines it; `last` reads the last token's alone, as the authors' code and
            later comparisons do.

    Kept tokens keep their positions, as in the authors' code.
    """

    layer: int = 2
    queries: Readers = "all"
    paper: ClassVar[str] = "https://arxiv.org/abs/2403.06764"
    authors_positions: ClassVar[PositionRule] = "original"
    presets: ClassVar[Registry[tuple[float, ...]]] = Registry(
        "preset", {"r50": (0.5,), "r75": (0.25,)}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layer(self.layer)
        self._choice("queries", get_args(Readers))

    def pattern(self) -> list[tuple[int, float]]:
        return [(self.layer, 1)]

    def score(self, tokens: DecoderTokens) -> Tensor:
        if self.queries == "last":
            return in_decoder(tokens, tokens.question_mask[:, -1:])
        rows = tokens.prompt_rows()
        return from_rows(rows, rows.columns)
