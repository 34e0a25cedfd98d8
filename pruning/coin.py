"""CoIn: tokens that are informative each and span much space together."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vlm_prune.pruning.base import OrderPruner, Stage
from vlm_prune.pruning.select import dpp, min_max
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.tokens import VisionTokens

RIDGE = 1e-6


@dataclass
class CoIn(OrderPruner):
    """Maximize (1 - alpha) x the sum of the tokens' informativeness + alpha x the log-determinant
    of their Gram matrix, greedily.

    CVPR 2026: https://cvpr.thecvf.com/virtual/2026/poster/39497

    Informativeness is beta x the norm of a projected token + (1 - beta) x its cosine to the mean
    embedding of the question, each scaled to [0, 1] over the image.

    Args:
        alpha: weight of the log-determinant, above 0.
        beta: weight of the norm, which alone tells tokens apart without a question.

    The paper's weights are not known to us. These were chosen on the embedded model by 180
    validation questions at 64 and at 32 tokens, among 16 pairs: their mean of 93.1 % right answers
    is the best, which (0.5, 0) and (0.5, 1) share; all with alpha from 0.25 to 0.75 have 90.8 % or
    more. A token's gain in the log-determinant is scaled by the smallest and the largest that a
    first token has, so that the sum stays one function of the set. The ridge is a millionth of the
    mean squared norm. The question is all text after the last image.
    """

    alpha: float = 0.25
    beta: float = 0.25
    stage: ClassVar[Stage] = "projector"
    paper: ClassVar[str] = "https://cvpr.thecvf.com/virtual/2026/poster/39497"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 < self.alpha <= 1 and 0 <= self.beta <= 1):
            raise InputError("alpha must be a weight in (0, 1] and beta one in [0, 1]")

    def order(self, vision: VisionTokens, count: int) -> Tensor:
        has_fp64 = vision.projected.device.type != "mps"
        tokens = vision.projected.to(torch.float64 if has_fp64 else torch.float32)
        questions = vision.question() or tokens[:, :0]
        means = torch.stack([q.sum(0).to(tokens) / max(1, len(q)) for q in questions])
        kernel = volume(tokens, self.informativeness(tokens, means), self.alpha)
        return dpp(kernel, count)

    def informativeness(self, tokens: Tensor, questions: Tensor) -> Tensor:
        """Returns informativeness in [0, 1], (M, N), of tokens (M, N, d) and mean
        embeddings of questions (M, d).
        """
        alignment = cosine_similarity(tokens, questions[:, None], dim=-1)
        return self.beta * min_max(tokens.norm(dim=-1)) + (1 - self.beta) * min_max(alignment)


def volume(tokens: Tensor, scores: Tensor, alpha: float) -> Tensor:
    """Returns the kernel of which greedy steps on its determinant are those of the joint objective.

    The objective adds (1 - alpha) score + alpha gain / range for each token, which orders sets as
    the sum of gains and of (1 - alpha) / alpha x range x score does: the log-determinant of
    diag(q) (G + ridge) diag(q), where log q is half of the latter.

    Shapes: tokens (M, N, d), scores (M, N) -> (M, N, N).

    Args:
        tokens: projected ones.
        scores: informativeness of each token.
        alpha: weight of the log-determinant.
    """
    # a small ridge keeps the kernel positive definite where tokens repeat
    gram = tokens @ tokens.transpose(1, 2)
    norms = gram.diagonal(dim1=1, dim2=2)
    ridge = RIDGE * norms.mean(1, keepdim=True)
    gram = gram + torch.diag_embed(ridge.expand_as(norms))
    # scores weigh as much as the range of the tokens' log norms, at alpha 1/2
    low, high = (norms + ridge).log().aminmax(dim=1, keepdim=True)
    quality = ((1 - alpha) / alpha * (high - low) * scores / 2).exp()
    return quality[:, :, None] * gram * quality[:, None]
