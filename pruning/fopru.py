"""FoPru: focal pruning by the vision encoder's own attention."""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from vlm_prune.pruning.base import ScorePruner, Stage
from vlm_prune.pruning.received import Queries, in_tower
from vlm_prune.vlm.tokens import VisionTokens

Strategy = Literal["rank", "row"]


@dataclass
class FoPru(ScorePruner):
    """Keep the tokens that receive most attention in the vision tower's feature layer.

    https://arxiv.org/abs/2411.14164

    Args:
        strategy: `rank` keeps the best tokens anywhere; `row` keeps whole rows of the grid, best
            row sums first, and trims the last row to its best tokens so that the budget is exact.
        queries: whose attention counts: `all` tokens, `patches` only, or the `cls` token.

    The score is the encoder's attention; which layer and which sum the paper takes is not known to
    us. We read the layer that produces the features and average over heads and queries. The paper
    keeps whole rows only; trimming is ours, to compare methods at equal counts.
    """

    strategy: Strategy = "rank"
    queries: Queries = "all"
    stage: ClassVar[Stage] = "encoder"
    paper: ClassVar[str] = "https://arxiv.org/abs/2411.14164"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._choice("strategy", get_args(Strategy))
        self._choice("queries", get_args(Queries))

    def score(self, vision: VisionTokens) -> Tensor:
        received = in_tower(vision, self.queries)
        return row_scores(received, vision.grids) if self.strategy == "row" else received


def row_scores(scores: Tensor, grids: tuple[tuple[int, int], ...]) -> Tensor:
    """Returns scores whose order takes rows of the grids one after the other,
    each row's best tokens first.

    Rows are ranked by their means, which order rows of one grid as their sums do.

    Shapes: (M, N) -> (M, N), N the tokens of all grids.
    """
    # each grid as (M, rows, columns), and the rank of every row by its mean, over all grids
    sizes = [rows * columns for rows, columns in grids]
    views = [v.unflatten(1, grid) for v, grid in zip(scores.split(sizes, 1), grids, strict=True)]
    means = torch.cat([view.mean(2) for view in views], 1)
    ranks = means.argsort(dim=1, descending=True, stable=True).argsort(1)
    # a row's rank comes first, then the rank of the token in its row
    widest = max(columns for _, columns in grids)
    order = [
        (rank[..., None] * widest + view.argsort(dim=2, descending=True, stable=True).argsort(2))
        for rank, view in zip(ranks.split([rows for rows, _ in grids], 1), views, strict=True)
    ]
    return -torch.cat([part.flatten(1) for part in order], 1).to(torch.float32)
