"""MMTok: image tokens that cover both the question and the image."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlm_prune.kernels.greedy_select import greedy_select
from vlm_prune.kernels.pairwise_cosine import pairwise_cosine
from vlm_prune.pruning.base import OrderPruner, Stage
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.tokens import VisionTokens


@dataclass
class MMTok(OrderPruner):
    """Keep the set that covers the question's tokens and all image tokens best, found greedily.

    https://arxiv.org/abs/2508.18264

    How well an image token covers a question token is a softmax, over the image tokens, of its
    cosine to that token's embedding; how well it covers an image token, one of the cosine of tower
    features. A set covers each of them as well as its best member does.

    Args:
        text_temperature: of the softmax for question tokens; the authors give 0.02 for LLaVA and
            0.01 for Qwen-VL.
        image_temperature: of the softmax for image tokens.
        image_weight: weight of the mean cover of image tokens; that of question tokens weighs 1.

    The question is all text after the last image. The authors drop stop words and the request for
    a short answer, for LLaVA alone. Without a question the image alone is covered.
    """

    text_temperature: float = 0.02
    image_temperature: float = 0.2
    image_weight: float = 0.5
    stage: ClassVar[Stage] = "projector"
    paper: ClassVar[str] = "https://arxiv.org/abs/2508.18264"

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.text_temperature, self.image_temperature) <= 0 or self.image_weight < 0:
            raise InputError("temperatures must be above 0 and image_weight at least 0")

    def order(self, vision: VisionTokens, count: int) -> Tensor:
        projected = vision.projected
        image = cover(vision.features, vision.features, self.image_temperature)
        questions = vision.question() or projected[:, :0]
        text = pad_sequence(
            [
                cover(features[None], question[None].to(features), self.text_temperature)[0].T
                for features, question in zip(projected, questions, strict=True)
            ],
            batch_first=True,
        )
        # tokens cover image tokens and question tokens, (M, N, N + T)
        both = torch.cat([self.image_weight * image, text.transpose(1, 2)], -1)
        return greedy_select(both, torch.ones_like(both[..., 0]), count, "coverage")


def cover(tokens: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Returns how well each token covers each of R targets, (M, N, R); each column sums to 1 / R.

    Args:
        tokens: (M, N, d).
        targets: what is to be covered, (M, R, d).
        temperature: of the softmax over tokens.
    """
    similarity = pairwise_cosine(tokens, targets) / temperature
    return similarity.softmax(1) / max(1, targets.shape[1])
