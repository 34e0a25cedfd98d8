"""What decoder layers after a cut are given instead of the model's own arguments."""

from dataclasses import dataclass, field
from typing import Any, Protocol, Self, runtime_checkable

from torch import Tensor
from transformers.masking_utils import create_causal_mask

from vlm_prune.vlm.cache import CACHE, cache_of


@runtime_checkable
class PerToken(Protocol):
    """An argument of decoder layers that holds something for every token so far."""

    def select_tokens(self, columns: Tensor, valid: Tensor, positions: Tensor) -> Self:
        """The part that layers after a cut get: tokens `columns`, all shapes (B, L')."""


@dataclass
class Segment:
    """What the layers after a cut see; tensors (B, L'), `dropped` (B, 1), on the host.

    `columns` says which of the model's tokens they are.
    """

    valid: Tensor
    dropped: Tensor
    columns: Tensor
    positions: Tensor
    kwargs: dict[str, Any] = field(default_factory=dict)

    def rebuild(
        self,
        decoder: Any,
        number: int,
        hidden: Tensor,
        positions: Tensor,
        kwargs: dict[str, Any],
        rotary: tuple[Tensor, ...],
    ) -> None:
        """Make mask and positions for layer `number`, given the model's `kwargs` for it.

        `rotary` holds the tables of tokens that keep the positions they had; if it is empty they
        are made from `positions` (B, n).
        """

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(hidden.device)

        positions = moved(positions)
        padded = not bool(self.valid.all())
        self.kwargs = {
            "position_ids": positions,
            "position_embeddings": rotary or decoder.rotary_emb(hidden, position_ids=positions),
            "attention_mask": create_causal_mask(
                config=decoder.config,
                inputs_embeds=hidden,
                attention_mask=moved(self.valid) if padded else None,
                # without a mask, gaps between positions would read as packed sequences
                position_ids=positions if padded else None,
                layer_idx=number,
                **{CACHE: cache_of(kwargs)},
            ),
        }
        self.kwargs |= {
            name: value.select_tokens(*map(moved, (self.columns, self.valid, self.positions)))
            for name, value in kwargs.items()
            if isinstance(value, PerToken)
        }
