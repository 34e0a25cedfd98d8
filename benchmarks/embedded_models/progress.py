"""How far a training is and how it went, as a resumed one needs it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import torch
from torch import Tensor

from vlm_prune.vlm.common.state import tensors_below


@dataclass
class TrainingProgress:
    """Steps, seconds and running figures of a training.

    Args:
        step: number of the next one.
        spent: seconds of all steps so far.
        running: running means by name.
    """

    step: int = 0
    spent: float = 0.0
    running: dict[str, float] = field(default_factory=dict)

    def count(self, right: Mapping[str, Sequence[bool]], pace: float, most: float) -> None:
        """Moves the running shares of right answers, which start at 0.3.

        Args:
            right: answers by kind, see `answers_right`.
            pace: by how much of the difference a single answer moves a share.
            most: at most by so much of it in a step.
        """
        for kind, hits in right.items():
            before = self.running.get(kind, 0.3)
            self.running[kind] = before + (fmean(hits) - before) * min(most, pace * len(hits))

    def tensors(self) -> dict[str, Tensor]:
        """Returns what `read` takes up again."""
        running = {f"running.{name}": torch.tensor(value) for name, value in self.running.items()}
        spent = torch.tensor(self.spent, dtype=torch.float64)
        return {"step": torch.tensor(self.step), "spent": spent} | running

    @classmethod
    def read(cls, state: Mapping[str, Tensor]) -> "TrainingProgress":
        """Returns the progress that a state was saved at."""
        running = {name: float(value) for name, value in tensors_below("running.", state).items()}
        return cls(int(state["step"]), float(state["spent"]), running)


def answers_right(
    kinds: Sequence[str], labels: Tensor, hits: Tensor, end: int
) -> dict[str, list[bool]]:
    """Returns which answers are right, by kind: those of which each token is, the end's aside.

    Args:
        kinds: of each labeled token, end tokens included, in reading order.
        labels: their ids, (n,).
        hits: whether each was predicted, (n,).
        end: id of the token that ends an answer.
    """
    right: dict[str, list[bool]] = {}
    whole = True
    for kind, word, hit in zip(kinds, (labels != end).tolist(), hits.tolist(), strict=True):
        if word:
            whole = whole and hit
        else:
            right.setdefault(kind, []).append(whole)
            whole = True
    return right
