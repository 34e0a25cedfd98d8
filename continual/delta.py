"""What one task changed in the weights, as low-rank factors in a file."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vlm_prune.continual.attention import fuse, sites, split
from vlm_prune.continual.layer import GatedLoRA, product
from vlm_prune.vlm.common.errors import InputError, naming
from vlm_prune.vlm.common.records import from_json
from vlm_prune.vlm.common.state import writing


@dataclass
class Factors:
    """The kept components of one site: A (k, d_in), B (d_out, k), gate (k,).

    `start` (r,) are the initial gates of all r components and `kept` (k,) the indices of those
    that stayed, for `diagnostics`.
    """

    A: Tensor
    B: Tensor
    gate: Tensor
    start: Tensor
    kept: Tensor

    @classmethod
    def of(cls, layer: GatedLoRA, start: Tensor) -> "Factors":
        """Returns the components of a layer whose gate is not 0."""
        kept = layer.weights.detach().nonzero().flatten()
        # components are rows of A, columns of B and gates
        a, b, gate = layer.A[kept], layer.B[:, kept], layer.weights[kept]
        return cls(*(t.detach().cpu().clone() for t in (a, b, gate, start, kept)))

    @property
    def rank(self) -> int:
        """Returns the number of components."""
        return len(self.gate)

    @property
    def shape(self) -> tuple[int, int]:
        """Returns d_out and d_in of the weight."""
        return len(self.B), self.A.shape[-1]

    def check(self, site: str) -> None:
        """Raises `InputError` unless all factors have matrices'
        shapes of one rank and are finite.
        """
        k = self.gate.numel()
        shapes = [self.A.shape[:1], self.B.shape[1:], self.gate.shape, self.kept.shape]
        if self.A.ndim != 2 or self.B.ndim != 2 or any(shape != (k,) for shape in shapes):
            raise InputError(f"the factors of {site!r} do not fit each other")
        if k and not 0 <= int(self.kept.min()) <= int(self.kept.max()) < self.start.numel():
            raise InputError(f"the components of {site!r} are not among the initial ones")
        for name in ("A", "B", "gate", "start"):
            factor: Tensor = getattr(self, name)
            if not (factor.is_floating_point() and factor.isfinite().all()):
                raise InputError(f"factor {name} of {site!r} has values that are not finite")

    def matrix(self) -> Tensor:
        """Returns the change of the weight in float32, (d_out, d_in)."""
        return product(self.A, self.B, self.gate)


def read_facts(text: str) -> dict[str, Any]:
    """Returns the facts of a delta from its JSON.

    Raises:
        InputError: if they are no JSON object, or name a task that no file may be called after.
    """
    facts = from_json(text, dict[str, Any], "its description", "train that task again")
    name = facts.get("name", "task")
    if not isinstance(name, str) or not name or Path(name).name != name or not name.isprintable():
        raise InputError(f"it names the task {str(name)[:60]!r}; train that task again")
    return facts


@dataclass
class Delta:
    """The change of each site by its name, and facts such as the method's and the task's name."""

    factors: dict[str, Factors]
    facts: dict[str, Any] = field(default_factory=dict)

    def norm(self) -> float:
        """Returns the Frobenius norm of the change over all sites together."""
        return float(sum(f.matrix().square().sum().double() for f in self.factors.values()) ** 0.5)

    def scale_to(self, norm: float) -> None:
        """Scales the change, in place, so that `norm()` is this."""
        # the change is linear in its gates
        ratio = norm / max(self.norm(), 1e-12)
        for factors in self.factors.values():
            factors.gate *= ratio

    def save(self, path: Path) -> None:
        """Writes safetensors, `site|factor` to tensor."""
        tensors = {
            f"{site}|{name}": tensor.contiguous()
            for site, factors in self.factors.items()
            for name, tensor in vars(factors).items()
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing(path):
            save_file(tensors, path, metadata={"facts": json.dumps(self.facts)})

    @classmethod
    def load(cls, path: Path) -> "Delta":
        """Reads what `save` wrote.

        Raises:
            InputError: if the file is missing, damaged or holds something else, its factors do not
                multiply, or they are not finite.
        """
        grouped: dict[str, dict[str, Tensor]] = {}
        with naming(f"{path} is no readable delta of a task"):
            with safe_open(path, "pt") as file:
                facts = read_facts((file.metadata() or {}).get("facts", "null"))
                for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                    site, _, name = key.rpartition("|")
                    grouped.setdefault(site, {})[name] = file.get_tensor(key)
            factors = {site: Factors(**parts) for site, parts in grouped.items()}
            for site, each in factors.items():
                each.check(site)
        return cls(factors, facts)

    def apply(self, model: nn.Module, sign: float = 1.0) -> None:
        """Adds the change to a plain CLIP, in place; `sign=-1` takes it away again (unmerge).

        Sums are taken in float32, so a weight comes back to float32 rounding, not bit for bit.

        Raises:
            InputError: if the model lacks a site or has it in another size, or a factor does not
                fit the others; the model is left as it was.
        """
        split(model)
        try:
            # all sites are checked before any weight changes
            known, weights = sites(model), {}
            for name, factors in self.factors.items():
                factors.check(name)
                weight = model.get_submodule(name).weight if name in known else None
                if weight is None or weight.shape != factors.shape:
                    raise InputError(f"this delta is of another model: {name} does not fit")
                weights[name] = weight
            for name, weight in weights.items():
                add(weight, sign * self.factors[name].matrix())
        finally:
            fuse(model)


@torch.no_grad()
def add(weight: Any, change: Tensor) -> None:
    """Adds to a weight in float32 whatever its own type is, in place."""
    weight.copy_(weight.float() + change.to(weight.device))
