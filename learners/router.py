"""The router of Wings: how much each token listens to each learner.

https://arxiv.org/abs/2406.03496, equation 5
"""

import torch
from torch import Tensor, nn


class Router(nn.Module):
    """Softmax over learners of a linear map of each token's row of main attention.

    The paper writes W[:, :s] a^T without saying how heads are merged; the default averages them.
    W starts at zero, so that every token starts with equal weights and positions never trained
    stay neutral (the released code leaves those columns random).

    Args:
        learners: how many learners there are.
        positions: sequence length that W covers.
        heads: heads of the main attention.
        summed: add heads up, with a bias and a SiLU, as the released code does.
    """

    def __init__(self, learners: int, positions: int, heads: int, summed: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(positions, learners))
        self.bias = nn.Parameter(torch.zeros(learners)) if summed else None
        self.heads = heads

    def columns(self, ranks: Tensor, consecutive: bool = False) -> Tensor:
        """Returns the value columns that attention sums up, for keys at
        `ranks` (B, N) -> (B, N, learners); a view where these are 0, 1, 2, ... in all rows.
        """
        if consecutive:
            return self.weight[: ranks.shape[1]].expand(len(ranks), -1, -1)
        return nn.functional.embedding(ranks, self.weight)

    def forward(self, read: Tensor) -> Tensor:
        """Returns weights of the learners that sum to 1, (B, S, learners).

        `read` is what attention made of the columns, with heads averaged, (B, S, learners).
        """
        if self.bias is not None:
            read = nn.functional.silu(read * self.heads + self.bias)
        return read.softmax(-1)
