"""RandLoRA: full-rank updates as learned scalings of fixed random bases."""

from dataclasses import dataclass
from typing import Any, ClassVar

from vlm_prune.continual.config import above
from vlm_prune.continual.methods.peft_adapter import PeftAdapter


@dataclass
class RandLoRA(PeftAdapter):
    """peft's RandLoRA; the opposite hypothesis to pruning ranks.

    https://arxiv.org/abs/2502.00987

    A smaller rank has *more* parameters; on ViT-B/16 with all sites rank 14 has about as many as
    CoDyRA at 16. The bases are the same in every task.

    Args:
        alpha: scale over the rank; None is 20 times the rank, peft's default ratio.
    """

    name: ClassVar[str] = "randlora"
    rank: int = 14
    alpha: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is not None:
            above("alpha", self.alpha, 1)

    def config(self, peft: Any, targets: str, names: list[str]) -> Any:
        alpha = 20 * self.rank if self.alpha is None else self.alpha
        key = self.context.recipe.seed
        return peft.RandLoraConfig(
            r=self.rank, randlora_alpha=alpha, target_modules=targets, projection_prng_key=key
        )
