"""What a method inside the language model owes to the engine that cuts there."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from torch import Tensor

from vlm_prune.vlm.tokens import DecoderTokens, Kept

Side = Literal["before", "after"]
CutsFor = Callable[[int], list["Cut"]]


@dataclass(frozen=True)
class Cut:
    """After `layer` decoder layers have run, keep `keep` tokens of each image."""

    layer: int
    keep: int


class Reducer(Protocol):
    """What the engine asks of a method.

    `reads` names the layer whose attention and keys the method sees, on either side of the cut; a
    cut at 0 has only the layer after it. `chooses_queries` says whether to ask for `query_mask`.
    """

    reads: ClassVar[Side]
    chooses_queries: ClassVar[bool]

    def query_mask(self, tokens: DecoderTokens) -> Tensor:
        """Question mask (M, T): tokens to read attention from, given the first layer's input."""

    def reduce(self, tokens: DecoderTokens, keep: int) -> Kept:
        """Keep `keep` tokens of each image."""

    def compact(
        self, keep: Tensor, *tensors: Tensor, right_padded: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """Close the gaps of a mask (B, L) in tensors (B, L, ...): validity (B, L'), and them."""
