"""S2-Attention: a window, and strided blocks of keys of which each head has its own."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlm_prune.pruning.attention.blocks import top_blocks
from vlm_prune.pruning.attention.inputs import AttentionInputs
from vlm_prune.pruning.attention.local import Local


@dataclass
class S2Attention(Local):
    """Keep a window, and every `stride`-th block of keys, shifted from one key head to the next.

    https://arxiv.org/abs/2407.17678

    The paper trains the model with the pattern, in blocks of 64; without training it is a control.
    With a `density` the strided blocks take up to half of what may be chosen, the window the rest.

    Args:
        window: tokens of the window without a `density`.
        stride: blocks from one strided block to the next, at least.
    """

    window: int = 1024
    stride: int = 16
    paper: ClassVar[str] = "https://arxiv.org/abs/2407.17678"

    def strided(self, inputs: AttentionInputs, stride: int) -> Tensor:
        """Returns the strided blocks, other ones for each key head, (G, blocks, blocks).

        Args:
            inputs: queries and keys.
            stride: blocks from one to the next.
        """
        distance = self.distances(inputs)
        index = torch.arange(distance.shape[1], device=distance.device)
        shift = torch.arange(inputs.groups, device=distance.device) * max(
            1, stride // inputs.groups
        )
        chosen = (index + shift[:, None]) % stride == 0
        return chosen[:, None] & (distance >= 0)

    def pattern(self, inputs: AttentionInputs, blocks: float) -> Tensor:
        """Returns strided blocks, as many as half of the budget allows, (G, blocks, blocks)."""
        geometry = self.geometry(inputs)
        may = geometry.candidates(inputs.length)
        may[:, : geometry.sink] = False
        most = float((may.sum(1) * geometry.row_counts(inputs.length)).sum())
        stride = max(self.stride, round(2 * most / max(blocks, 1.0)))
        kept = self.strided(inputs, stride) & may.to(inputs.key.device)
        # a short prompt may have more strided blocks than the whole budget
        return kept & top_blocks(kept.float(), geometry, blocks)

    def choose(self, inputs: AttentionInputs) -> Tensor:
        return super().choose(inputs) | self.strided(inputs, self.stride)
