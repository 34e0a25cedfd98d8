"""PyramidDrop: drop a fixed share of the image tokens at the end of each stage of layers."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlm_prune.pruning.base import DecoderScorePruner
from vlm_prune.pruning.received import in_decoder
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.registry import Registry
from vlm_prune.vlm.layer_pruning import Side
from vlm_prune.vlm.tokens import DecoderTokens


@dataclass
class PyramidDrop(DecoderScorePruner):
    """Three cuts at equal distances, each keeping a share of the tokens that the last
    instruction token attends to most.

    https://arxiv.org/abs/2410.17247

    Args:
        preset: `paper` keeps 1/2, 1/4 and 1/8 of all tokens, whatever the budget.
        ratio: share of the tokens that each cut keeps.

    The score is the attention that the layer after the cut pays for its whole input, averaged over
    heads; only the last instruction token's row is computed. The paper fixes the ratio and so the
    cost; here `ratio` relates the counts after the cuts, which are solved from `budget`. Below a
    quarter of all tokens the first cut moves up.
    """

    ratio: float = 0.5
    reads: ClassVar[Side] = "after"
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.17247"
    presets: ClassVar[Registry[tuple[float, ...]]] = Registry(
        "preset", {"paper": (0.5, 0.25, 0.125)}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.ratio <= 1:
            raise InputError(f"ratio {self.ratio} is out of range; give a share in (0, 1]")

    def pattern(self) -> list[tuple[int, float]]:
        return [(8 * stage, self.ratio**stage) for stage in (1, 2, 3)]

    def score(self, tokens: DecoderTokens) -> Tensor:
        return in_decoder(tokens, tokens.question_mask[:, -1:])
