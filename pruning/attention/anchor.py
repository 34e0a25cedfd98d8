"""AnchorAttention: single keys whose products come near the largest local one."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlm_prune.pruning.attention.base import BlockAttention
from vlm_prune.pruning.attention.blocks import Geometry
from vlm_prune.pruning.attention.inputs import AttentionInputs
from vlm_prune.vlm.common.errors import InputError


@dataclass
class AnchorAttention(BlockAttention):
    """Keep single keys, for groups of query blocks, by how near they come to an anchor.

    https://arxiv.org/abs/2505.23520

    A row's anchor is its largest product with the first block of keys and with its own group. A key
    before the group is kept for all its rows where the mean query of any of its blocks comes within
    `theta` of the mean anchor of that block. In the released code the last block before a group is
    no candidate, keys of the first group may count twice, and rows behind the last whole group are
    dense; here every key counts once.

    With a `density` the keys that come nearest are kept instead, and groups are no longer than half
    of it: a group's own keys cost more of a short prompt.

    Args:
        step: query blocks of a group, at most.
        theta: without a `density`, how far below its anchor a product may be.
    """

    step: int = 16
    theta: float = 12.0
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.23520"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.executor == "flex":
            raise InputError(
                "AnchorAttention keeps single keys, which FlexAttention cannot skip; give executor "
                "gather"
            )

    def geometry(self, inputs: AttentionInputs) -> Geometry:
        step = self.step
        if self.density is not None:
            step = min(step, max(1, int(self.density / 2 * inputs.tokens / self.block)))
        return Geometry(step * self.block, 1, step * self.block, self.block)

    def anchors(self, inputs: AttentionInputs) -> Tensor:
        """Returns each row's largest product with the first block or with
        its group's own keys, (H, n).
        """
        block, step = self.block, self.geometry(inputs).rows // self.block
        blocks = inputs.length // block
        # the last group may be short; its keys are padded with zeros, which no row of its own sees
        groups = -(-blocks // step)
        query = inputs.grouped.unflatten(2, (blocks, block))
        padded = torch.nn.functional.pad(
            inputs.key, (0, 0, 0, groups * step * block - inputs.length)
        )
        key = padded.unflatten(1, (groups, step * block))
        found = torch.empty(query.shape[:-1], device=key.device)
        causal = torch.ones(block, block, dtype=torch.bool, device=key.device).tril()
        for place in range(step):
            # the blocks at the same place of all groups see equally many keys of their own group
            # (G, groups, H / G x block, d): heads that share keys are rows of one product
            rows = query[:, :, place::step].transpose(1, 2).flatten(2, 3)
            # a block sees the keys of its group up to its own block, whose half is causal
            seen = (place + 1) * block
            size = max(1, inputs.most // (inputs.heads * block * seen))
            best = torch.empty(rows.shape[:3], device=key.device)
            for first in range(0, rows.shape[1], size):
                part = slice(first, first + size)
                own = key[:, part, :seen][:, : rows.shape[1] - first]
                scores = rows[:, part] @ own.transpose(-1, -2)
                scores.unflatten(2, (-1, block))[..., -block:].masked_fill_(~causal, -torch.inf)
                best[:, part] = scores.amax(-1)
            found[:, :, place::step] = best.unflatten(2, (-1, block)).transpose(1, 2)
        # all rows but the first block's see the first block
        size = max(1, inputs.most // (inputs.heads * block)) // block * block or block
        sink = inputs.key[:, :block].transpose(1, 2)
        near = found.flatten(2)
        for first in range(block, inputs.length, size):
            rows = inputs.grouped[:, :, first : first + size]
            best = (rows.flatten(1, 2) @ sink).amax(-1).unflatten(1, (rows.shape[1], -1))
            so_far = near[:, :, first : first + size]
            so_far.copy_(torch.maximum(so_far, best))
        return near.flatten(0, 1) * inputs.scaling

    def scores(self, inputs: AttentionInputs) -> Tensor:
        """Returns by how much a group's mean query times each key before it exceeds
        the group's anchor, (R, groups, n).

        Heads that share a mask take the largest value of them.
        """
        geometry = self.geometry(inputs)
        step = geometry.rows // self.block
        query = inputs.block_means(self.block)[0]
        anchors = self.anchors(inputs).unflatten(0, (inputs.groups, -1))
        # (G, H / G, n) -> (G, H / G, blocks): the mean anchor of each block's rows
        anchors = anchors.unflatten(2, (-1, self.block)).mean(3)
        masks = inputs.heads if self.share == "head" else inputs.groups
        found = inputs.key.new_full(
            (masks, *geometry.shape(inputs.length)), -torch.inf, dtype=torch.float32
        )
        for number, begin in enumerate(geometry.starts(inputs.length).tolist()):
            if not begin:
                continue
            # the group's blocks, and the keys before its local region
            rows = slice(number * step, (number + 1) * step)
            own = query[:, :, rows]
            products = own.flatten(1, 2) @ inputs.key[:, :begin].float().transpose(1, 2)
            # (G, H / G x blocks, keys) -> (G, H / G, blocks, keys); the best block decides
            products = products.unflatten(1, own.shape[1:3])
            above = products.mul_(inputs.scaling).sub_(anchors[:, :, rows, None]).amax(2)
            found[:, number, :begin] = (
                above.flatten(0, 1) if self.share == "head" else above.amax(1)
            )
        return found

    def choose(self, inputs: AttentionInputs) -> Tensor:
        return self.scores(inputs) >= -self.theta
