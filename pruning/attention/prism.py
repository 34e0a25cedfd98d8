"""Prism: pooling of the rotary pairs that turn fast apart from those that turn slowly."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from vlm_prune.pruning.attention.base import BlockAttention, kept_mass
from vlm_prune.pruning.attention.inputs import AttentionInputs, blocks_before
from vlm_prune.vlm.attention import turns_neighbors
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.registry import unknown
from vlm_prune.vlm.families import family_of

Bands = Literal["measured", "paper"]


@dataclass
class Prism(BlockAttention):
    """Keep the blocks to which mean queries pay most in either of two bands of the heads' width.

    https://arxiv.org/abs/2602.08426

    A mean over a block washes out the rotary pairs that turn by more than once within it, so that what
    they say is lost beside the others; each band has a temperature of its own, and a block stays
    where either keeps it. The paper's bands follow from one position for each token. With positions
    in rows and columns, pairs that turn with time stand still within a frame; so here a pair is
    washed out where the mean of its turns over a block, at the prompt's real positions, is below a
    half. Where none is, this is mean pooling with a temperature.

    Args:
        mass: without a `density`, the share of each band's estimated attention that is kept.
        bands: `measured` as above, `paper` for the first half of the pairs, and the last three quarters.
    """

    mass: float = 0.95
    bands: Bands = "measured"
    paper: ClassVar[str] = "https://arxiv.org/abs/2602.08426"
    reads_rotation: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bands not in get_args(Bands):
            raise InputError(unknown("bands", str(self.bands), get_args(Bands)))

    def admit(self, model: Any) -> None:
        """Raises `InputError` for models without SDPA, or whose rotary pairs are neighbors."""
        super().admit(model)
        family = family_of(model)
        if turns_neighbors(family.decoder.layers[-1]):
            raise InputError(
                f"Prism reads pairs of a head's two halves, and {family.model.config.model_type} models "
                "turn neighbors; give pooled"
            )

    def split(self, inputs: AttentionInputs) -> list[Tensor]:
        """Returns the indices (d_z,) in a head's width of each band, without bands that are empty.

        Where positions are not known there is one band.
        """
        width = inputs.key.shape[2]
        turns = inputs.rotary
        pairs = width // 2 if turns is None else turns.shape[2] // 2
        index = torch.arange(pairs, device=inputs.key.device)
        if self.bands == "paper":
            fast, slow = index < pairs // 2, index >= pairs // 4
        elif turns is None:
            return [torch.arange(width, device=index.device)]
        else:
            # a pair whose angle hardly turns within a block keeps its length in a mean
            cos, sin = turns[..., :pairs].float().unflatten(1, (-1, self.block))
            kept = torch.hypot(cos.mean(1), sin.mean(1)).mean(0)
            slow = kept > 0.5
            fast = ~slow
        # both numbers of each pair, half a width apart; what is not rotated turns slowest
        rest = torch.arange(2 * pairs, width, device=index.device)
        bands = [
            torch.cat([index[band], index[band] + pairs, *more])
            for band, more in ((fast, []), (slow, [rest]))
        ]
        return [band for band in bands if len(band)]

    def weights(self, inputs: AttentionInputs) -> Tensor:
        """Returns the estimated attention between blocks in each
        band, (bands, H, blocks, blocks).
        """
        query, key = inputs.block_means(self.block)
        key = key[:, None]
        width, found = key.shape[-1], []
        before = blocks_before(key.shape[2], key.device)
        for band in self.split(inputs):
            # what a band's means have lost beside the whole, as a temperature
            share = len(band) / width
            temperature = share**0.5
            for whole in (query, key):
                part = whole[..., band].square().mean((-2, -1), keepdim=True)
                temperature = (
                    temperature * (part / whole.square().mean((-2, -1), keepdim=True)).sqrt()
                )
            scores = query[..., band] @ key[..., band].transpose(-1, -2)
            scores = scores * (inputs.scaling / share**0.5) / temperature
            found.append(scores.masked_fill(~before, -torch.inf).softmax(-1).flatten(0, 1))
        return torch.stack(found)

    def scores(self, inputs: AttentionInputs) -> Tensor:
        """Scores blocks by the larger estimate of both bands, (R, blocks, blocks)."""
        return self.shared(self.weights(inputs).amax(0), inputs)

    def choose(self, inputs: AttentionInputs) -> Tensor:
        return kept_mass(self.weights(inputs), self.mass).any(0)
