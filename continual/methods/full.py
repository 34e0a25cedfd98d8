"""Full fine-tuning, one task after another."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from vlm_prune.continual.config import EncoderName, one_of
from vlm_prune.continual.delta import Delta
from vlm_prune.continual.methods.base import Context, Method, ParameterGroup, opened


@dataclass
class FullFineTune(Method):
    """Train all weights of one tower or of both; the logit scale stays, as in every method here.

    Args:
        encoder: `vision`, `text` or `all` for both.
    """

    name: ClassVar[str] = "full"
    encoder: EncoderName = "all"

    def __post_init__(self) -> None:
        one_of("encoder", self.encoder, ("vision", "text", "all"))

    def begin_task(self, context: Context) -> list[ParameterGroup]:
        self.start(context)
        context.clip.model.requires_grad_(False)
        return opened(self.weights(), context.recipe.lr)

    def weights(self) -> dict[str, nn.Parameter]:
        """Returns the trained weights by name."""
        return self.context.clip.parameters(None if self.encoder == "all" else self.encoder)

    def copies(self) -> dict[str, Tensor]:
        """Returns copies of the trained weights as they are now."""
        return {name: p.detach().clone() for name, p in self.weights().items()}

    def end_task(self) -> Delta | None:
        self.context.clip.model.requires_grad_(False)
        return None
