"""Sequential LoRA of a fixed rank, merged after every task."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from vlm_prune.continual.delta import Delta
from vlm_prune.continual.methods.gated import LowRank
from vlm_prune.continual.methods.random_rank import reference


@dataclass
class LoRA(LowRank):
    """Plain LoRA with scale 1, anew for every task.

    https://arxiv.org/abs/2106.09685

    Args:
        match: folder of another run; each task's change is scaled to the Frobenius norm, over all
            sites together, of that run's change. The control for a method whose gain may come from
            smaller updates.
    """

    name: ClassVar[str] = "lora"
    match: Path | str | None = None

    def finish(self, delta: Delta) -> Delta:
        if self.match is not None:
            delta.scale_to(reference(self.match, self.context.number).norm())
        return delta
