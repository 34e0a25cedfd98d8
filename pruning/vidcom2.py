"""VidCom2: more tokens for frames that stand out, fewer for tokens that are like the rest."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlm_prune.pruning.video import VideoPruner, frame_means, frames_of
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.tokens import Kept, VisionTokens

WIDTHS = (0.125, 0.25, 0.5, 1.0, 2.0)


@dataclass
class VidCom2(VideoPruner):
    """Keep of each frame the tokens least like the video's and the frame's mean; frames that are
    less like the video get more of the budget.

    https://arxiv.org/abs/2505.14454

    Args:
        temperature: of the softmax over frames.

    Likeness is a sum of Gaussian kernels of normalized tokens, in the half of the channels that
    vary least over the video. Rounded budgets are made exact by the tokens' own scores: the least
    like of those left out are added, or the most like of those kept dropped.
    """

    temperature: float = 0.01
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.14454"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0:
            raise InputError(f"temperature {self.temperature} is out of range; give more than 0")

    def reduce_video(self, vision: VisionTokens) -> Kept:
        k, tokens = self.count(vision), steady_half(vision.projected)
        frames = frames_of(vision, tokens)
        size = frames.shape[2]
        to_video = kernels(frames, tokens.mean(1)[:, None, None])
        redundancy = to_video + kernels(frames, frame_means(frames)[:, :, None])
        shares = (-to_video.mean(2) / self.temperature).softmax(1)
        rate = self.budget if isinstance(self.budget, float) else k / tokens.shape[1]
        wanted = size * (rate * (1 + shares - shares.mean(1, keepdim=True))).clamp_max(1)
        budgets = wanted.round().clamp_min(1)
        # the rank of each token among its frame's, the least redundant first
        rank = redundancy.argsort(dim=2, stable=True).argsort(2)
        # each frame's first come before all others, and those within its budget before the rest
        before = (rank == 0).int() + (rank < budgets[..., None]).int()
        order = redundancy.flatten(1).argsort(dim=1, stable=True)
        classes = before.flatten(1).gather(1, order)
        chosen = order.gather(1, classes.argsort(dim=1, descending=True, stable=True)[:, :k])
        return Kept.at(vision.projected, chosen.sort(1).values)


def steady_half(tokens: Tensor) -> Tensor:
    """Returns tokens in the half of their channels that vary least over all of them, normalized.

    Shapes: (M, N, d) -> (M, N, d / 2), in fp32.
    """
    # some channels at a time, so that no copy of the video is made in fp32
    spread = torch.cat([part.float().var(1, correction=0) for part in tokens.split(64, 2)], 1)
    channels = spread.argsort(dim=1, stable=True)[:, : max(1, tokens.shape[2] // 2)]
    half = tokens.gather(2, channels[:, None].expand(-1, tokens.shape[1], -1))
    return normalize(half.float(), dim=-1)


def kernels(tokens: Tensor, center: Tensor) -> Tensor:
    """Returns the sum over five widths a of exp(-|x - c|^2 / 2a), of normalized tokens x.

    Shapes: tokens (M, T, n, d), center (M, T or 1, 1, d) -> (M, T, n).
    """
    # all tokens have length 1; differences would be a copy of them
    products = (tokens @ center.mT)[..., 0]
    squared = (1 - 2 * products + center.square().sum(-1)).clamp_min(0)
    total = torch.zeros_like(squared)
    for width in WIDTHS:
        total += torch.exp(-squared / (2 * width))
    return total
