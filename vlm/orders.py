"""Orders in which a method takes the tokens of images, found once for several budgets."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vlm_prune.vlm.common.timing import now


@dataclass
class FoundOrder:
    """The beginning of an order.

    Args:
        key: of the order: equal keys, equal beginnings.
        tokens: in the order in which they are taken, (M, k).
        seconds: that finding it took.
    """

    key: object
    tokens: Tensor
    seconds: float


@dataclass
class SharedOrders:
    """Orders of the tokens of some images, found for one budget and used for others.

    Args:
        device: of the tokens.
        reused_s: seconds that finding orders took which were then used again.
    """

    device: torch.device
    reused_s: float = 0.0
    found: list[FoundOrder] = field(default_factory=list)

    def first(self, count: int, key: object, find: Callable[[int], Tensor]) -> Tensor:
        """Returns the beginning of an order, (M, count); it is found unless one as long is known.

        Args:
            count: tokens of each image.
            key: what tells the order from others.
            find: finds so many tokens of it.
        """
        for known in self.found:
            if known.tokens.shape[1] >= count and known.key == key:
                self.reused_s += known.seconds
                return known.tokens[:, :count]
        start = now(self.device)
        tokens = find(count)
        self.found.append(FoundOrder(key, tokens, now(self.device) - start))
        return tokens
