"""CoDyRA with a budget: the most important components of all sites together are kept."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlm_prune.continual.config import above, one_of, within
from vlm_prune.continual.layer import GateInit
from vlm_prune.continual.methods.base import Context, ParameterGroup
from vlm_prune.continual.methods.gated import Gated, assign
from vlm_prune.continual.prox import dense_steps


def kept_components(importance: Tensor, keep: int) -> Tensor:
    """Returns a mask (n,) of the `keep` largest of `importance` (n,);
    ties go to the lowest index.
    """
    order = importance.sort(descending=True, stable=True).indices
    mask = torch.zeros_like(importance, dtype=torch.bool)
    mask[order[:keep]] = True
    return mask


@dataclass
class CoDyRAPlus(Gated):
    """Train densely, then cut components in rounds, down to a budget shared by all sites.

    A variant of https://arxiv.org/abs/2412.01004 of our own. CoDyRA's gates start at random and
    decide by themselves which components stay; here they start equal, importance comes from what
    training did, and the rank is a budget and no consequence of step sizes. A cut component stays
    out for the rest of the task.

    Args:
        budget: mean rank per site that is left.
        importance: `product` is |w_i| |B_i| |A_i|, the component's Frobenius norm; `taylor` is
            |w_i dL/dw_i|, the first-order change of the loss without the component, as a moving
            average over training batches.
        dense: share of the steps before the first cut.
        settle: share of the steps, at the end, after the last cut.
        rounds: number of cuts, evenly spaced, each removing as many components.
        decay: of the moving average.
    """

    name: ClassVar[str] = "codyra-plus"
    gate_init: GateInit = "ones"
    budget: float = 8.0
    importance: Literal["product", "taylor"] = "product"
    dense: float = 0.5
    settle: float = 0.1
    rounds: int = 10
    decay: float = 0.95
    _active: Tensor | None = field(default=None, init=False, repr=False)
    _taylor: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        within("budget", self.budget, 0, self.rank)
        one_of("importance", self.importance, ("product", "taylor"))
        within("dense", self.dense)
        within("settle", self.settle, 0, 1 - self.dense)
        within("decay", self.decay)
        above("rounds", self.rounds, 1)

    def begin_task(self, context: Context) -> list[ParameterGroup]:
        groups = super().begin_task(context)
        self._active = torch.ones(self.rank * len(self.layers), dtype=torch.bool)
        self._active = self._active.to(context.clip.device)
        self._taylor = torch.zeros(len(self._active), device=context.clip.device)
        return groups

    def kept_at(self, step: int) -> int:
        """Returns the number of components left after `step`."""
        steps, all_ = self.context.recipe.steps, self.rank * len(self.layers)
        last = max(1, steps - 1 - int(self.settle * steps))  # the step of the last cut
        first = min(dense_steps(steps, self.dense), last)
        final = round(self.budget * len(self.layers))
        if step < first:
            return all_
        # `rounds` cuts at even distances, the last of which leaves `final` components
        done = 1.0 if step >= last else (step - first) / max(1, last - first)
        cuts = self.rounds if done == 1.0 else int(done * self.rounds)
        return all_ - (all_ - final) * cuts // self.rounds

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        gates = self.gates()
        assert self._active is not None and self._taylor is not None
        values = torch.cat(gates)
        if self.importance == "taylor":
            gradients = torch.cat(
                [torch.zeros_like(g) if g.grad is None else g.grad for g in gates]
            )
            # a running mean of how much the loss would change without each gate
            self._taylor.lerp_((values * gradients).abs(), 1 - self.decay)
        keep = self.kept_at(step)
        if keep < int(self._active.sum()):
            # components that were cut stay cut
            scores = self._importance(values).masked_fill(~self._active, -1.0)
            self._active = kept_components(scores, keep)
        if keep < len(values):
            assign(gates, values.masked_fill(~self._active, 0.0))

    def _importance(self, values: Tensor) -> Tensor:
        if self.importance == "taylor":
            assert self._taylor is not None
            return self._taylor
        return values.abs() * torch.cat([layer.sizes() for layer in self.layers.values()])

    def state(self) -> dict[str, Tensor]:
        if self._active is None or self._taylor is None:
            return {}
        return {"alive": self._active.to(torch.uint8), "taylor": self._taylor}

    def load_state(self, state: dict[str, Tensor]) -> None:
        if state and self._active is not None:
            device = self._active.device
            self._active = state["alive"].bool().to(device)
            self._taylor = state["taylor"].to(device)
