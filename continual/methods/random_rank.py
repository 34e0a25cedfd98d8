"""Control for CoDyRA: as many components are dropped, but at random."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from vlm_prune.continual.config import within
from vlm_prune.continual.delta import Delta
from vlm_prune.continual.methods.gated import Gated
from vlm_prune.vlm.errors import InputError


def reference(run: Path | str, number: int) -> Delta:
    """The delta that a finished run wrote for a task.

    Raises:
        InputError: if it wrote none.
    """
    path = Path(run) / "deltas" / f"task-{number}.safetensors"
    if not path.is_file():
        raise InputError(f"{run} has no deltas of task {number}; give the folder of a LoRA run")
    return Delta.load(path)


@dataclass
class RandomRank(Gated):
    """Train gated LoRA without pruning, then drop components at random, site by site.

    Separates *which* components CoDyRA keeps from *how many*. As gates are not shrunk, updates are
    larger than CoDyRA's; `lora` with `match` controls for that.

    Args:
        like: folder of a run whose ranks are matched, task by task and site by site.
        keep: share of the components kept where `like` is None.
    """

    name: ClassVar[str] = "random-rank"
    like: Path | str | None = None
    keep: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        within("keep", self.keep)

    def finish(self, delta: Delta) -> Delta:
        other = None if self.like is None else reference(self.like, self.context.number)
        for number, (name, factors) in enumerate(delta.factors.items()):
            if other is not None and name not in other.factors:
                raise InputError(f"the run in {self.like} did not adapt {name}")
            ours = factors.rank
            left = other.factors[name].rank if other else round(self.keep * ours)
            if left > ours:
                raise InputError(f"{self.like} keeps {left} components, above this rank {ours}")
            drawn = torch.randperm(ours, generator=self.context.generator(2, number))
            pick = drawn[:left].sort().values
            factors.A, factors.B = factors.A[pick], factors.B[:, pick]
            factors.gate, factors.kept = factors.gate[pick], factors.kept[pick]
        return delta
