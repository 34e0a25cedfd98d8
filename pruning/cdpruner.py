"""CDPruner: a determinantal point process over image tokens, conditioned on the question."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlm_prune.kernels.pairwise_cosine import pairwise_cosine
from vlm_prune.pruning.base import OrderPruner, Stage
from vlm_prune.pruning.select import dpp, min_max
from vlm_prune.vlm.tokens import VisionTokens


@dataclass
class CDPruner(OrderPruner):
    """Keep the set with the largest determinant of diag(r) S diag(r): S holds the cosines of the
    projected tokens, r their relevance to the question.

    https://arxiv.org/abs/2506.10967

    Args:
        negated: take relevance from the negated cosine, as the released code does for CLIP, whose
            patches often point away from the text that they show.

    Relevance is the mean cosine to the question's tokens, scaled to [0, 1]. The paper takes it from
    CLIP's text tower for models built on CLIP, and from the language model's own embeddings where
    there is none. Hugging Face's LLaVA checkpoints hold no text tower, so it is the latter here:
    projected tokens against the text embeddings. Without a question all tokens are equally
    relevant. The kernel is in fp64 where the device has it: near its rank, gains are rounding.
    """

    negated: bool = False
    stage: ClassVar[Stage] = "projector"
    paper: ClassVar[str] = "https://arxiv.org/abs/2506.10967"

    def order(self, vision: VisionTokens, count: int) -> Tensor:
        has_fp64 = vision.projected.device.type != "mps"
        projected = vision.projected.to(torch.float64 if has_fp64 else torch.float32)
        questions = vision.question() or projected[:, :0]
        scores = torch.cat(
            [relevance(i[None], q[None]) for i, q in zip(projected, questions, strict=True)]
        )
        kernel = conditioned(min_max(-scores if self.negated else scores), projected)
        return dpp(kernel, count)


def relevance(image: Tensor, text: Tensor) -> Tensor:
    """Returns the mean cosine of each image token to the text tokens;
    (M, N, d), (M, T, d) -> (M, N).
    """
    return pairwise_cosine(image, text.to(image)).sum(-1) / max(1, text.shape[1])


def conditioned(scores: Tensor, features: Tensor) -> Tensor:
    """Returns the conditioned kernel diag(r) S diag(r), of scores r (M, N) and
    cosines S of features (M, N, d); (M, N, N).
    """
    return scores[:, :, None] * pairwise_cosine(features, features) * scores[:, None]
