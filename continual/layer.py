"""A linear map with a low-rank update whose components carry weights (gates)."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GateInit = Literal["randn", "ones", "const", "|randn|"]


def initial_gate(kind: GateInit, rank: int, value: float, generator: torch.Generator) -> Tensor:
    """Returns the gates (r,) that a task starts with.

    Args:
        kind: standard normal (CoDyRA), all 1, all `value`, or the normal's absolute value.
        rank: r.
        value: for the constant kind.
        generator: draws the normal ones.
    """
    if kind in ("randn", "|randn|"):
        gate = torch.randn(rank, generator=generator)
        return gate.abs() if kind == "|randn|" else gate
    return torch.full((rank,), 1.0 if kind == "ones" else value)


class GatedLoRA(nn.Module):
    """y = base(x) + B diag(w) A x, without a scale and without dropout.

    https://arxiv.org/abs/2412.01004

    A (r, d_in) starts Kaiming-uniform and B (d_out, r) at 0, so the output is the base's, bit for
    bit, until the first step. A, B and w are float32 whatever the base's type is.

    Args:
        base: the map that is adapted; its parameters are frozen.
        rank: components r.
        gate: initial w (r,); None makes it plain LoRA, with every w fixed at 1.
        generator: for A.
    """

    def __init__(
        self, base: nn.Linear, rank: int, gate: Tensor | None, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        device = base.weight.device
        a = torch.empty(rank, base.in_features)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        self.A = nn.Parameter(a.to(device))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        self.gate = None if gate is None else nn.Parameter(gate.float().to(device))

    def forward(self, x: Tensor) -> Tensor:
        # the gate goes into A, whose size does not grow with the batch
        down = self.A if self.gate is None else self.A * self.gate[:, None]
        update = F.linear(F.linear(x, down.to(x.dtype)), self.B.to(x.dtype))
        output: Tensor = self.base(x) + update
        return output

    @property
    def weight(self) -> Tensor:
        """Returns the base's weight, whose type open_clip looks up."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """Returns the base's bias; a model that reads it instead of
        calling this module trains nothing.
        """
        return self.base.bias

    @property
    def weights(self) -> Tensor:
        """Returns the gates (r,); ones for plain LoRA."""
        return torch.ones_like(self.A[:, 0]) if self.gate is None else self.gate

    def sizes(self) -> Tensor:
        """Returns |B_i| |A_i| of each component (r,): what one unit of
        its gate adds to the weight.
        """
        sizes: Tensor = self.B.norm(dim=0) * self.A.norm(dim=1)
        return sizes


def product(a: Tensor, b: Tensor, gate: Tensor) -> Tensor:
    """Returns B diag(w) A in float32, (d_out, d_in).

    Args:
        a: A, (r, d_in).
        b: B, (d_out, r).
        gate: w, (r,).
    """
    return (b.float() * gate.float()) @ a.float()
