"""What the pruned classes of all families share."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from torch import Tensor

from vlm_prune.vlm.projector import Projector
from vlm_prune.vlm.serving.selection import Image, choose
from vlm_prune.vlm.serving.settings import KEY, Settings


class PrunedModel:
    """Mixed in before a class of vLLM, which calls `reduced` on what its tower has seen."""

    config: Any

    @cached_property
    def pruner(self) -> Any:
        return Settings(**getattr(self.config, KEY)).pruner()

    def reduced(
        self, images: Sequence[Image], has_cls: bool, pool: Any = None
    ) -> list[tuple[Tensor, Tensor]]:
        """Returns token indices (k,) and features (k, d_l) of what is kept of each image.

        Args:
            images: their tokens.
            has_cls: whether the tower puts a CLS token in front.
            pool: averages values of patches into those of tokens, where a token has several.
        """
        return choose(self.pruner, images, self.projection, self.query_key, has_cls, pool)

    @property
    def projection(self) -> Projector:
        """Returns the projector's two layers."""
        raise NotImplementedError

    def query_key(self, *tower: Tensor) -> tuple[Tensor, Tensor]:
        """Returns queries and keys (M T, H, S, d) from `Image.tower`."""
        raise NotImplementedError
