"""ConDU: experts trained from the initial model, merged by sign into one change."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from vlm_prune.continual.delta import Delta
from vlm_prune.continual.methods.base import Context, ParameterGroup
from vlm_prune.continual.methods.full import FullFineTune


def unify(changes: Tensor) -> Tensor:
    """Returns for each weight the largest change where the sum is positive, else the least.

    Args:
        changes: of n tasks, (n, ...).
    """
    return changes.amax(0).where(changes.sum(0) > 0, changes.amin(0))


@dataclass
class ConDU(FullFineTune):
    """Train every task from the initial model; merge its change with the earlier tasks' by sign.

    https://arxiv.org/abs/2503.10705

    An earlier task's change is re-created from the merged one: its mask keeps the weights whose
    merged change has its sign, and its scale restores the mean magnitude. Masks and scales serve
    the next merge alone. The paper also answers with the re-created experts that are nearest by
    class prototypes; here the merged model answers, and nothing is added at inference.
    """

    name: ClassVar[str] = "condu"
    _initial: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _merged: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _masks: list[dict[str, Tensor]] = field(default_factory=list, init=False, repr=False)
    _scales: list[float] = field(default_factory=list, init=False, repr=False)

    @torch.no_grad()
    def begin_task(self, context: Context) -> list[ParameterGroup]:
        groups, weights = super().begin_task(context), self.weights()
        if not self._initial:
            self._initial = self.copies()
        device = context.clip.device
        self._initial = {name: start.to(device) for name, start in self._initial.items()}
        self._merged = {name: weights[name] - start for name, start in self._initial.items()}
        for name, start in self._initial.items():
            weights[name].copy_(start)
        return groups

    @torch.no_grad()
    def end_task(self) -> Delta | None:
        masks: list[dict[str, Tensor]] = [{} for _ in range(len(self._scales) + 1)]
        sizes, kept = ([0.0] * len(masks) for _ in range(2))
        for name, weight in self.weights().items():
            start, merged = self._initial[name], self._merged[name]
            changes = [
                scale * merged * mask[name].to(merged.device)
                for scale, mask in zip(self._scales, self._masks, strict=True)
            ]
            changes.append(weight - start)
            unified = unify(torch.stack(changes))
            for number, change in enumerate(changes):
                mask = change * unified > 0
                masks[number][name] = mask
                sizes[number] += float(change.abs().sum().double())
                kept[number] += float(unified[mask].abs().sum().double())
            weight.copy_(start + unified)
        self._masks, self._merged = masks, {}
        self._scales = [size / k if k else 0.0 for size, k in zip(sizes, kept, strict=True)]
        return super().end_task()

    def state(self) -> dict[str, Tensor]:
        masks = {
            f"mask-{number}|{name}": mask
            for number, one in enumerate(self._masks)
            for name, mask in one.items()
        }
        initial = {f"initial|{name}": start for name, start in self._initial.items()}
        return masks | initial | {"scales": torch.tensor(self._scales, dtype=torch.float64)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._scales = state["scales"].tolist()
        self._masks = [{} for _ in self._scales]
        for key, tensor in state.items():
            kind, _, name = key.partition("|")
            if kind == "initial":
                self._initial[name] = tensor
            elif name:
                self._masks[int(kind.removeprefix("mask-"))][name] = tensor
