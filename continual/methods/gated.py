"""What all methods that train (gated) LoRA share: insert, then merge the components that are left."""

from dataclasses import dataclass, field
from typing import get_args

import torch
from torch import Tensor, nn

from vlm_prune.continual.config import Placement, above, one_of
from vlm_prune.continual.delta import Delta, Factors
from vlm_prune.continual.layer import GatedLoRA, GateInit, initial_gate
from vlm_prune.continual.methods.base import Context, Method, ParameterGroup
from vlm_prune.continual.model import insert, remove


@dataclass
class LowRank(Method):
    """Base of the LoRA methods.

    Args:
        rank: components per site at the start of each task.
        placement: the sites.
    """

    rank: int = 16
    placement: Placement = field(default_factory=Placement)
    layers: dict[str, GatedLoRA] = field(default_factory=dict, init=False, repr=False)
    starts: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        above("rank", self.rank, 1)

    def begin_task(self, context: Context) -> list[ParameterGroup]:
        self.start(context)
        self.layers = insert(context.clip, self.placement, self.make)
        self.starts = {name: layer.weights.detach().clone() for name, layer in self.layers.items()}
        factors = [p for layer in self.layers.values() for p in (layer.A, layer.B)]
        return [{"params": factors, "lr": context.recipe.lr}]

    def make(self, base: nn.Linear, number: int) -> GatedLoRA:
        """Makes the layer of one site, drawn from this task's and this site's own generator."""
        generator = self.context.generator(0, number)
        return GatedLoRA(base, self.rank, self.gate(generator), generator)

    def gate(self, generator: torch.Generator) -> Tensor | None:
        """Returns the initial gate of one site (r,); None for plain LoRA."""
        return None

    def adapters(self) -> dict[str, nn.Parameter]:
        return {
            f"{site}.{name}": parameter
            for site, layer in self.layers.items()
            for name, parameter in layer.named_parameters()
            if parameter.requires_grad
        }

    def gates(self) -> list[Tensor]:
        """Returns the gates (r,) of each site, for methods that have some."""
        return [layer.gate for layer in self.layers.values() if layer.gate is not None]

    def end_task(self) -> Delta | None:
        """Drops components whose gate is 0, and merges the others in float32."""
        factors = {
            name: Factors.of(layer, self.starts[name]) for name, layer in self.layers.items()
        }
        delta = self.finish(Delta(factors, {"method": self.name, "task": self.context.number}))
        remove(self.context.clip, self.layers, {n: f.matrix() for n, f in delta.factors.items()})
        self.layers, self.starts = {}, {}
        return delta

    def finish(self, delta: Delta) -> Delta:
        """Returns what is merged, after a method's last change to it; here none."""
        return delta


@dataclass
class Gated(LowRank):
    """Base of the methods whose components carry a trained gate.

    Args:
        gate_init: `randn` (the paper's), `ones`, `const` with `gate_value`, or `|randn|`.
        gate_value: of `const`.
        gate_lr: the gates' learning rate; None is the recipe's.
    """

    gate_init: GateInit = "randn"
    gate_value: float = 1.0
    gate_lr: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("gate_init", self.gate_init, get_args(GateInit))
        if self.gate_lr is not None:
            above("gate_lr", self.gate_lr, 0)

    def begin_task(self, context: Context) -> list[ParameterGroup]:
        groups = super().begin_task(context)
        lr = context.recipe.lr if self.gate_lr is None else self.gate_lr
        return [*groups, {"params": self.gates(), "lr": lr}]

    def gate(self, generator: torch.Generator) -> Tensor | None:
        return initial_gate(self.gate_init, self.rank, self.gate_value, generator)


@torch.no_grad()
def assign(gates: list[Tensor], values: Tensor) -> None:
    """Writes a flat tensor of values (total components,) back into the gates."""
    torch._foreach_copy_(gates, values.split([len(g) for g in gates]))
