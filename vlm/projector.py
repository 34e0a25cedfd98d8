"""The map from the vision tower's features to the language model's embeddings: two layers.

Its own modules are called, so that adapters, quantization, offloading and hooks act as they do in
the model. Methods that need its matrices get those that the modules really apply.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self, TypeGuard
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Affine:
    """x -> x W^T + b, where there is no module: weight (out, in) and bias (out,)."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, features: Tensor) -> Tensor:
        return linear(features, self.weight, self.bias)


@dataclass(frozen=True, eq=False)
class Weights:
    """What a projector's two layers apply: W1 (h, d_v), b1 (h,), W2 (d_l, h), b2 (d_l,)."""

    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None


@dataclass(frozen=True)
class _Known:
    """Weights, and what the layers made of fixed rows when these were read."""

    first: Callable[[], Any]
    answers: tuple[Tensor, Tensor]
    weights: Weights

    def describes(self, first: Map, answers: tuple[Tensor, Tensor]) -> bool:
        """Returns whether a projector whose first layer is `first` and that gives
        `answers` has these weights.
        """
        return self.first() is first and all(map(_same, self.answers, answers))


_KNOWN: WeakKeyDictionary[Any, _Known] = WeakKeyDictionary()


@dataclass(frozen=True)
class Projector:
    """A two-layer projector.

    Args:
        first: a linear layer from d_v to h.
        act: acts elementwise.
        second: a linear layer from h to d_l.
    """

    first: Map
    act: Map
    second: Map = field(repr=False)

    @classmethod
    def of(cls, w1: Tensor, b1: Tensor | None, act: Map, w2: Tensor, b2: Tensor | None) -> Self:
        """Returns the projector that two matrices and the activation between them make.

        Args:
            w1: first matrix, (D, d_v).
            b1: its bias, (D,).
            act: the activation.
            w2: second matrix, (d_l, D).
            b2: its bias, (d_l,).
        """
        return cls(Affine(w1, b1), act, Affine(w2, b2))

    def __call__(self, features: Tensor) -> Tensor:
        """Projects features, (..., d_v) -> (..., d_l)."""
        return self.second(self.act(self.first(features)))

    def parameters(self) -> list[nn.Parameter]:
        """Returns the parameters of its layers."""
        layers = (self.first, self.second)
        return [p for layer in layers if isinstance(layer, nn.Module) for p in layer.parameters()]

    def weights(self, features: Tensor) -> Weights:
        """Returns the matrices that its layers apply to tokens such as `features` (..., d_v).

        The same object comes back until the layers do something else: whether they do is told by
        what they make of two fixed rows, whatever their weights are stored as.
        """
        with torch.inference_mode(False), torch.no_grad():
            row = _row(features.shape[-1], features)
            hidden = self.first(row)
            answers = hidden, self.second(_row(hidden.shape[-1], hidden))
            known = _KNOWN.get(self.second)
            if known is not None and known.describes(self.first, answers):
                return known.weights
            weights = Weights(*_matrix(self.first, row), *_matrix(self.second, hidden))
            _KNOWN[self.second] = _Known(weakref.ref(self.first), answers, weights)
            return weights


def _row(width: int, like: Tensor) -> Tensor:
    """Returns one fixed random row (1, width), which no change of a matrix leaves as it is."""
    row = torch.randn(1, width, generator=torch.Generator().manual_seed(0))
    return row.to(like.device, like.dtype)


def _same(one: Tensor, other: Tensor) -> bool:
    alike = one.dtype == other.dtype and one.device == other.device
    return alike and torch.equal(one, other)


def _matrix(layer: Map, row: Tensor) -> tuple[Tensor, Tensor | None]:
    """Returns weight (out, in) and bias (out,) that a layer applies to rows such as `row` (1, in).

    A layer that holds them as plain tensors is asked for these. What any other one, adapted,
    quantized or offloaded, does to a unit matrix is its weight, and what it does to zeros its bias.
    """
    if isinstance(layer, Affine) or _is_plain(layer):
        return layer.weight, layer.bias
    bias = layer(torch.zeros_like(row))
    unit = torch.eye(row.shape[-1], dtype=row.dtype, device=row.device)
    return (layer(unit) - bias).T.contiguous(), bias[0]


def _is_plain(layer: Map) -> TypeGuard[nn.Linear]:
    """Returns whether a layer does what its weight says: nothing wraps it,
    hooks it or replaces its tensors.
    """
    return (
        type(layer) is nn.Linear
        and type(layer.weight) is nn.Parameter
        and "forward" not in vars(layer)
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
    )
