"""What sparse attention computed inside a block."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Computed:
    """What one layer computed of one prompt, in products of queries and keys.

    Args:
        layer: number of the decoder layer.
        row: of the batch.
        tokens: of the prompt.
        forced: products that all methods compute.
        kept: all that were computed, as a tensor that is on the model's device.
    """

    layer: int
    row: int
    tokens: int
    forced: int
    kept: Tensor

    @property
    def total(self) -> int:
        """Returns the products of each query with the keys up to its own."""
        return self.tokens * (self.tokens + 1) // 2

    @property
    def density(self) -> float:
        """Returns the computed share of the causal half."""
        return float(self.kept) / self.total

    @property
    def chosen_density(self) -> float | None:
        """Returns the same without what all methods compute; None where that is everything."""
        open_products = self.total - self.forced
        return (float(self.kept) - self.forced) / open_products if open_products else None


@dataclass
class SparseTrace:
    """What was computed of each prompt in each layer, and how often attention was left to SDPA and why.

    Args:
        computed: of each layer of each forward, one entry for a prompt.
        dense: calls that were left to SDPA, by reason.
        decoded: keys that decoding steps read, of all layers.
        decodable: keys that there were.
    """

    computed: list[Computed] = field(default_factory=list)
    dense: Counter[str] = field(default_factory=Counter)
    decoded: int = 0
    decodable: int = 0

    @property
    def density(self) -> float:
        """Returns the computed share of the causal half, the mean over prompts and layers.

        Layers and prompts that SDPA computed are not among them. 1 where there are no others.
        """
        if not self.computed:
            return 1.0
        return sum(c.density for c in self.computed) / len(self.computed)

    @property
    def chosen_density(self) -> float:
        """Returns the same without what all methods compute, of which the method had the choice."""
        chosen = mean_chosen(self.computed)
        return 1.0 if chosen is None else chosen

    @property
    def decode_density(self) -> float:
        """Returns the share of the keys that decoding steps read; 1 where none was sparse."""
        return self.decoded / self.decodable if self.decodable else 1.0

    def of_row(self, row: int, layers: int) -> list[float]:
        """Returns the share of the causal half that each layer computed of one row of the last batch, 1
        where it was SDPA's.

        Args:
            row: of the batch.
            layers: of the decoder.
        """
        found = {c.layer: c.density for c in self.computed if c.row == row}
        return [found.get(layer, 1.0) for layer in range(layers)]

    def chosen_of_row(self, row: int) -> float | None:
        """Returns the share of what methods choose from that was computed of one row of the last batch, the
        mean over layers; None where they had no choice.
        """
        return mean_chosen({c.layer: c for c in self.computed if c.row == row}.values())


def mean_chosen(computed: Iterable[Computed]) -> float | None:
    """Returns the mean share of what methods choose from; None where they had no choice."""
    shares = [own.chosen_density for own in computed]
    known = [share for share in shares if share is not None]
    return sum(known) / len(known) if known else None
