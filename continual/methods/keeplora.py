"""KeepLoRA: updates that leave the weights' principal and earlier tasks' input directions alone."""

from dataclasses import dataclass, field
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_prune.continual.config import Placement, above, tower_of, within
from vlm_prune.continual.delta import Delta
from vlm_prune.continual.layer import GatedLoRA
from vlm_prune.continual.methods.base import Context, ParameterGroup
from vlm_prune.continual.methods.gated import LowRank
from vlm_prune.continual.parallel import average_gradients


def leading(energies: Tensor, needed: float) -> int:
    """Returns how many of the energies (n,), which fall, sum up to `needed`; n if all fall short."""
    if needed <= 0:
        return 0
    # energies descend: as many as it takes until their sum reaches what is needed
    return min(int((energies.cumsum(0) < needed).sum()) + 1, len(energies))


def principal_inputs(weight: Tensor, energy: float) -> Tensor:
    """Returns the top right singular vectors of a weight, (d_in, k), that hold a share of its energy.

    Args:
        weight: (d_out, d_in).
        energy: share of the squared singular values.
    """
    _, values, vectors = torch.linalg.svd(weight.double(), full_matrices=False)
    # the weight's energy along an input direction is its squared singular value
    squares = values.square()
    inputs: Tensor = vectors[: leading(squares, energy * float(squares.sum()))].T
    return inputs


def with_features(basis: Tensor, moment: Tensor, energy: float) -> Tensor:
    """Returns a basis (d, k + n) that holds a share of the features' energy; n is the least such.

    Energy that the basis holds already counts.

    Args:
        basis: orthonormal columns (d, k).
        moment: sum of x xᵀ over the features, (d, d).
        energy: share of the features' squared norms.
    """
    # what of the features the basis does not hold yet, by its principal directions
    outside = torch.eye(len(basis), dtype=basis.dtype, device=basis.device) - basis @ basis.T
    rest = outside @ moment @ outside
    values, vectors = torch.linalg.eigh(rest)
    total, left = float(moment.trace()), float(rest.trace())
    # eigh is ascending; the basis already holds total - left
    count = leading(values.flip(0), energy * total - (total - left))
    count = min(count, basis.shape[0] - basis.shape[1])
    columns = torch.cat([basis, vectors.flip(1)[:, :count]], 1)
    # orthonormal once more, as rounding has made it less so
    orthonormal: Tensor = torch.linalg.qr(columns).Q
    return orthonormal


def residual_factors(gradient: Tensor, basis: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Returns A (r, d_in) and B (d_out, r), whose product is the gradient's best one outside a basis.

    A's rows are orthonormal and orthogonal to the basis; where fewer than r directions are left
    the others are 0.

    Args:
        gradient: of a weight, (d_out, d_in).
        basis: protected input directions, orthonormal columns (d_in, k).
        rank: r.
    """
    width, protected = basis.shape
    # a full QR's last columns are orthogonal to the first ones
    free = torch.linalg.qr(basis, mode="complete").Q[:, protected:]
    u, s, v = torch.linalg.svd(gradient.to(basis.dtype) @ free, full_matrices=False)
    found = min(rank, len(s))
    a, b = basis.new_zeros(rank, width), basis.new_zeros(len(gradient), rank)
    # the gradient's largest directions among inputs that are not protected; the rest stays zero
    a[:found] = v[:found] @ free.T
    b[:, :found] = u[:, :found] * s[:found]
    return a, b


class ResidualLoRA(GatedLoRA):
    """y = base(x) + scale (B - start) A x with A fixed.

    The paper takes start A off the base's weight; here the base stays as it is, which gives the
    base's outputs until the first step without rounding.

    Args:
        base: the map that is adapted; its parameters are frozen.
        rank: components r.
        scale: of the update.
        generator: for A, until the first gradient is there.
    """

    start: Tensor

    def __init__(
        self, base: nn.Linear, rank: int, scale: float, generator: torch.Generator
    ) -> None:
        super().__init__(base, rank, None, generator)
        self.scale = scale
        self.A.requires_grad_(False)
        self.register_buffer("start", torch.zeros_like(self.B), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        update = F.linear(F.linear(x, self.A.to(x.dtype)), self.change().to(x.dtype))
        output: Tensor = self.base(x) + update
        return output

    def change(self) -> Tensor:
        """Returns scale (B - start), (d_out, r)."""
        return self.scale * (self.B - self.start)


@dataclass
class KeepLoRA(LowRank):
    """LoRA in input directions that neither the weights nor earlier tasks' features rely on.

    https://arxiv.org/abs/2601.19659

    Protected are, at each site, the top right singular vectors of the weight before the first
    task and, after each task, those of its inputs: training images and class prompts. A is fixed
    to the top singular vectors of the first step's gradient outside of them, B starts at what
    belongs to these and is trained. The paper's runs have lr=1e-3 and weight_decay=0.01; its
    OneCycle schedule is the loop's cosine here. Energy that earlier tasks' directions hold counts
    toward the next one's share, which is our reading.

    Args:
        vision_energy: share of the vision weights' energy that is protected.
        text_energy: share of the text weights' energy that is protected.
        feature_energy: share of a task's features' energy that is protected from the next tasks.
        scale: alpha / r of the update.
    """

    name: ClassVar[str] = "keeplora"
    placement: Placement = field(default_factory=lambda: Placement(modules=("q", "k", "v", "o")))
    vision_energy: float = 0.85
    text_energy: float = 0.2
    feature_energy: float = 0.99
    scale: float = 1.0
    _protected: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("vision_energy", "text_energy", "feature_energy"):
            within(option, getattr(self, option))
        above("scale", self.scale, 0, strict=True)

    def begin_task(self, context: Context) -> list[ParameterGroup]:
        super().begin_task(context)
        if not self._protected:
            energies = {"vision": self.vision_energy, "text": self.text_energy}
            self._protected = {
                name: principal_inputs(layer.base.weight.detach(), energies[tower_of(name)])
                for name, layer in self.layers.items()
            }
        factors = [layer.B for layer in self.layers.values()]
        return [{"params": factors, "lr": context.recipe.lr}]

    @property
    def residuals(self) -> dict[str, ResidualLoRA]:
        """Returns the layers by site."""
        return cast(dict[str, ResidualLoRA], self.layers)

    def make(self, base: nn.Linear, number: int) -> ResidualLoRA:
        return ResidualLoRA(base, self.rank, self.scale, self.context.generator(0, number))

    def loss(self, pixels: Tensor, labels: Tensor, step: int) -> Tensor:
        if step == 0:
            self._open(pixels, labels)
        return super().loss(pixels, labels, step)

    def _open(self, pixels: Tensor, labels: Tensor) -> None:
        """Sets A and B from the gradient of a batch."""
        bases = {name: layer.base.weight for name, layer in self.residuals.items()}
        for weight in bases.values():
            weight.requires_grad_(True)
        super().loss(pixels, labels, 0).backward()
        average_gradients(bases.values())
        for name, layer in self.residuals.items():
            weight, basis = bases[name], self._protected[name]
            assert weight.grad is not None
            a, b = residual_factors(weight.grad, basis.to(weight.device), self.rank)
            weight.requires_grad_(False).grad = None
            # `start` is subtracted again, so that the output begins as the base's
            for tensor, value in ((layer.A, a), (layer.B, b), (layer.start, b)):
                tensor.data.copy_(value)
            layer.B.grad = None

    @torch.no_grad()
    def end_task(self) -> Delta | None:
        for name, moment in self._moments().items():
            basis = self._protected[name].to(moment.device)
            self._protected[name] = with_features(basis, moment, self.feature_energy)
        # what was learned, without the start, is merged with a gate of 1
        for layer in self.residuals.values():
            layer.B.copy_(layer.change())
        return super().end_task()

    def _moments(self) -> dict[str, Tensor]:
        """Returns for each site the sum of x xᵀ over its inputs (d_in, d_in), float64."""
        found: dict[str, Tensor] = {}

        def note(name: str, x: Tensor) -> None:
            rows = x.flatten(0, -2).double()
            moment = rows.T @ rows
            found[name] = found[name] + moment if name in found else moment

        hooks = [
            layer.register_forward_pre_hook(lambda _, inputs, name=name: note(name, inputs[0]))
            for name, layer in self.residuals.items()
        ]
        for pixels, _ in self.context.train():
            self.context.clip.encode_image(pixels)
        self.context.encode(self.context.ids)
        for hook in hooks:
            hook.remove()
        return found

    def state(self) -> dict[str, Tensor]:
        fixed = {
            f"{name}|{kind}": getattr(layer, kind).detach()
            for name, layer in self.residuals.items()
            for kind in ("A", "start")
        }
        return {f"{name}|protected": basis for name, basis in self._protected.items()} | fixed

    def load_state(self, state: dict[str, Tensor]) -> None:
        for key, tensor in state.items():
            name, _, kind = key.rpartition("|")
            if kind == "protected":
                self._protected[name] = tensor
            else:
                getattr(self.layers[name], kind).data.copy_(tensor)
