"""DHSA: chunks of the prompt, which in a video are its frames."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlm_prune.pruning.attention.base import BlockAttention
from vlm_prune.pruning.attention.inputs import AttentionInputs


@dataclass
class DHSA(BlockAttention):
    """Keep the blocks of keys whose chunks' mean keys, longer by the root of their length, are paid most.

    https://arxiv.org/abs/2510.24606

    The paper trains a predictor of where chunks begin. Here an image, or a frame of a video, is a
    chunk, and text is cut into chunks of a block, as all tokens are where some have been dropped: then
    these are the ranks of mean pooling. A query block keeps first what is in a chunk that does not end
    before it. All heads share a mask.

    Args:
        keys: without a `density`, the keys that each query block keeps.
    """

    keys: int = 2048
    paper: ClassVar[str] = "https://arxiv.org/abs/2510.24606"
    reads_frames: ClassVar[bool] = True

    def chunks(self, inputs: AttentionInputs) -> Tensor:
        """Returns the number of each token's chunk, ascending from 0, (n,).

        Chunks are images, frames, and parts of text of at most a block.
        """
        index = torch.arange(inputs.length, device=inputs.key.device)
        frames = inputs.frames
        if frames is None:
            return index // self.block
        frames = frames.to(index.device)
        changes = frames[1:] != frames[:-1]
        # where a run of one image or of text begins, at or before each token
        begins = torch.where(torch.cat([changes.new_ones(1), changes]), index, 0).cummax(0).values
        cut = (frames < 0) & ((index - begins) % self.block == 0)
        first = torch.cat([changes.new_ones(1), changes]) | cut
        number: Tensor = first.cumsum(0) - 1
        return number

    def scores(self, inputs: AttentionInputs) -> Tensor:
        """Scores each key block by what a query block pays the chunks in it, (1, blocks, blocks).

        The score is a mean over the block's tokens and all heads.
        """
        chunk = self.chunks(inputs)
        count, device = int(chunk[-1]) + 1, chunk.device
        lengths = torch.bincount(chunk, minlength=count)
        sums = torch.zeros(inputs.groups, count, inputs.key.shape[2], device=device)
        sums.index_add_(1, chunk, inputs.key.float())
        keys = sums / lengths.sqrt()[:, None]
        query = inputs.block_means(self.block)[0] * self.block**0.5
        scores = (query.mean(1) @ keys.transpose(1, 2) * inputs.scaling).mean(0)
        # chunks that do not end before a query block come first
        ends = lengths.cumsum(0)
        begins = torch.arange(scores.shape[0], device=device) * self.block
        scores = torch.where(ends > begins[:, None], scores.max() + 1, scores)
        by_block: Tensor = scores[:, chunk].unflatten(1, (-1, self.block)).mean(2)
        return by_block[None]

    def choose(self, inputs: AttentionInputs) -> Tensor:
        scores = self.scores(inputs)
        may = self.geometry(inputs).candidates(inputs.length, scores.device)
        order = scores.masked_fill(~may, -torch.inf).argsort(dim=-1, descending=True, stable=True)
        ranks = torch.arange(scores.shape[-1], device=scores.device)
        kept = (ranks < -(-self.keys // self.block)).expand(scores.shape)
        return torch.zeros_like(kept).scatter(-1, order, kept)
