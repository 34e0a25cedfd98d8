"""FastV: an image is worth half its tokens after the second layer."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlm_prune.pruning.base import DecoderScorePruner
from vlm_prune.pruning.received import in_decoder
from vlm_prune.pruning.schedule import check_layer
from vlm_prune.vlm.registry import Registry
from vlm_prune.vlm.tokens import DecoderTokens


@dataclass
class FastV(DecoderScorePruner):
    """Drop image tokens that receive little attention after an early decoder layer.

    https://arxiv.org/abs/2403.06764

    Args:
        preset: the paper's ratios by name instead of a count solved from `budget`: `r50` keeps half
            the tokens, `r75` a quarter.
        layer: K, the 1-based decoder layer (of 32) whose attention is read; its output is pruned.

    The score is the last token's attention, averaged over heads. The paper describes the average
    over all tokens, which needs the whole map; the last row is what later comparisons run.
    """

    layer: int = 2
    paper: ClassVar[str] = "https://arxiv.org/abs/2403.06764"
    presets: ClassVar[Registry[tuple[float, ...]]] = Registry(
        "preset", {"r50": (0.5,), "r75": (0.25,)}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layer(self.layer)

    def pattern(self) -> list[tuple[int, float]]:
        return [(self.layer, 1)]

    def score(self, tokens: DecoderTokens) -> Tensor:
        return in_decoder(tokens, tokens.asked[:, -1:])
