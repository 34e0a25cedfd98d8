"""Control for CoDyRA: as many components are dropped, but at random."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from vlm_prune.continual.config import within
from vlm_prune.continual.delta import Delta
from vlm_prune.continual.methods.gated import Gated
from vlm_prune.vlm.common.errors import InputError


def reference(run: Path | str, number: int) -> Delta:
    """Reads the delta that a finished run wrote for a task.

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
    larger than CoDyRA's unless `match_norm` is on.

    Args:
        like: folder of a run whose ranks are matched, task by task and site by site.
        match_norm: scale each task's change to the Frobenius norm, over all sites together, of the
            change in the run `like`.
        keep: share of the components kept where `like` is None.

    Raises:
        InputError: for a value out of range, or `match_norm` without `like`.
    """

    name: ClassVar[str] = "random-rank"
    like: Path | str | None = None
    match_norm: bool = False
    keep: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        within("keep", self.keep)
        if self.match_norm and self.like is None:
            raise InputError("match_norm needs a run to match; give its folder as like")

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
        if other is not None and self.match_norm:
            delta.scale_to(other.norm())
        return delta
