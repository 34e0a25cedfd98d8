"""Compiled prefill: the decoder layers run a prompt as one compiled form that they share.

A pruner's hooks stay outside of what is compiled: each layer's `forward` is replaced, which hooks on the
layer do not notice. Where lengths are padded, padding stands behind the tokens, which do not look there,
and is cut off before the cache gets keys and values.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from inspect import signature
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlm_prune.vlm.block import refuse_compiled
from vlm_prune.vlm.cache import CACHE, cache_of
from vlm_prune.vlm.common.errors import InputError, first_line
from vlm_prune.vlm.families import Family, family_of

STEP = 32
MOST_FORMS = 256
"""Compiled forms of layers: one for each length, batch size, and kind of mask and layer."""


def padded_length(length: int) -> int:
    """Returns the length to which a prompt of `length` tokens is padded.

    It is a multiple of 32, and of an eighth of the power of two at or below `length` where that is more.
    """
    step = max(STEP, 1 << max(0, length.bit_length() - 4))
    return -(-length // step) * step


class NewKeys:
    """Stands for the cache in a layer: it holds the prompt's keys and values alone."""

    keys: Tensor
    values: Tensor

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Returns the keys and values (B, G, n, d) that it is given.

        Args:
            key_states: the prompt's keys.
            value_states: its values.
            args: as for transformers' `Cache.update`.
            kwargs: likewise.
        """
        self.keys, self.values = key_states, value_states
        return key_states, value_states


def run_layer(
    layer: Any, hidden_states: Tensor, mask: Tensor | None, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns a decoder layer's output (B, n, D), keys and values (B, G, n, d).

    Args:
        layer: a decoder layer.
        hidden_states: its input, (B, n, D).
        mask: of attention, (B, 1, n, n); None where it is causal.
        cos: of the rotation by position, (B, n, d).
        sin: likewise.
    """
    new = NewKeys()
    output = type(layer).forward(
        layer,
        hidden_states,
        attention_mask=mask,
        position_embeddings=(cos, sin),
        use_cache=True,
        **{CACHE: new},
    )
    return output, new.keys, new.values


@cache
def compiled_run_layer(pads: bool) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Returns `run_layer` compiled: of padded lengths for each one apart, with CUDA graphs, else for any.

    All layers of a kind share a form, as their weights are its inputs.
    """
    options: dict[str, Any] = {"mode": "reduce-overhead"} if pads else {}
    if "recompile_limit" in signature(torch.compile).parameters:
        options["recompile_limit"] = MOST_FORMS
    return torch.compile(run_layer, fullgraph=True, dynamic=not pads, **options)


def compilations() -> int:
    """Returns how many graphs this process has compiled."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return 0 if dynamo is None else int(dynamo.counters["stats"]["unique_graphs"])


@dataclass
class Prefill:
    """The padded tensors of a prefill that is under way.

    Args:
        states: the last layer's output, and the same with its padding.
        tables: masks and rotations with what was made of them, which several layers get.
    """

    states: tuple[Tensor, Tensor] | None = None
    tables: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def input(self, states: Tensor, tail: int) -> Tensor:
        """Returns a layer's input padded by `tail` tokens."""
        # what the layer before gave is padded already, unless something came between
        if self.states is not None and self.states[0] is states:
            return self.states[1]
        return padded_rows(states, tail)

    def table(self, table: Tensor, make: Callable[[Tensor, int], Tensor], tail: int) -> Tensor:
        """Returns a table padded, made once.

        Args:
            table: a mask, or cosines or sines.
            make: pads it.
            tail: by how many tokens.
        """
        for source, padded in self.tables:
            if source is table:
                return padded
        self.tables.append((table, make(table, tail)))
        return self.tables[-1][1]


def padded_rows(rows: Tensor, tail: int) -> Tensor:
    """Returns rows of tokens (B, n, d) with `tail` rows of zeros behind them."""
    return pad(rows, (0, 0, 0, tail)) if tail else rows


def padded_mask(mask: Tensor, tail: int) -> Tensor:
    """Returns a mask of attention (B, 1, n, n), boolean or additive, with `tail` more queries and keys.

    Tokens do not see the keys behind them; the added queries see all tokens, so that they stay finite.
    """
    is_bool = mask.dtype == torch.bool
    mask = pad(mask, (0, tail), value=False if is_bool else torch.finfo(mask.dtype).min)
    return pad(mask, (0, 0, 0, tail), value=is_bool)


@dataclass
class CompiledLayer:
    """Stands in for a decoder layer's `forward`: what begins a prompt runs compiled, all else as before.

    Args:
        family: the model's adapter.
        number: of the layer, from 0.
        layer: the layer.
        pads: whether lengths are padded.
        local: of each thread the `prefill` that is under way.
    """

    family: Family
    number: int
    layer: Any
    pads: bool
    local: threading.local

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        from torch._dynamo.exc import TorchDynamoException
        from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

        held, length = cache_of(kwargs), hidden_states.shape[1]
        if args or length == 1 or torch.is_grad_enabled() or self.holds(held):
            return type(self.layer).forward(self.layer, hidden_states, *args, **kwargs)
        if self.number == 0:
            check_layers(self.family)
            self.local.prefill = Prefill()
            # outputs of CUDA graphs of the last prompt may be written over from here on
            torch.compiler.cudagraph_mark_step_begin()
        prefill: Prefill = self.local.prefill
        tail = padded_length(length) - length if self.pads else 0
        mask, (cos, sin) = kwargs.get("attention_mask"), kwargs["position_embeddings"]
        try:
            output, keys, values = compiled_run_layer(self.pads)(
                self.layer,
                prefill.input(hidden_states, tail),
                None if mask is None else prefill.table(mask, padded_mask, tail),
                prefill.table(cos, padded_rows, tail),
                prefill.table(sin, padded_rows, tail),
            )
        except (TorchDynamoException, GuardOnDataDependentSymNode) as error:
            raise InputError(
                f"the decoder layers of this {self.family.model.config.model_type} model cannot be "
                f"compiled ({first_line(error)}); leave out compile"
            ) from error
        if held is not None:
            held.update(keys[:, :, :length], values[:, :, :length], self.number)
        shown: Tensor = output[:, :length]
        prefill.states = shown, output
        if self.number == len(self.family.decoder.layers) - 1:
            del self.local.prefill
        return shown

    def holds(self, held: Any) -> bool:
        """Returns whether a cache holds tokens in front of this forward's, or is none that grows."""
        return held is not None and bool(held.is_compileable or held.get_seq_length(self.number))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Returns what a copy of the layer runs: the method of its class."""
        layer = memo.get(id(self.layer), self.layer)
        return MethodType(type(layer).forward, layer)


def check_layers(family: Family) -> None:
    """Raises `InputError` when what is inside the decoder layers would be lost in compiled code."""
    attention = family.decoder.config._attn_implementation
    if attention not in ("sdpa", "eager"):
        raise InputError(
            f"only sdpa and eager attention are compiled, not {attention}; leave out compile"
        )
    for layer in family.decoder.layers:
        for module in layer.modules():
            if module is not layer and (module._forward_hooks or module._forward_pre_hooks):
                raise InputError(
                    "hooks inside decoder layers do not run in compiled code; leave out compile"
                )


@contextmanager
def compiled_prefill(model: Any, pads: bool | None = None) -> Iterator[None]:
    """Runs prompts through compiled decoder layers while the block is open.

    They are compiled when a prompt first comes. On a GPU prompts are padded to a few lengths,
    `padded_length`, for each of which there is a compiled form with its CUDA graphs; on a CPU one form takes
    all lengths. The tower, the projector, the choice of tokens and decoding run as without it, as does a
    forward with gradients or behind a cached prefix. Pruning blocks may be opened inside.

    Args:
        model: a model of a supported family, or a PEFT model around one.
        pads: whether prompts are padded; unless given, where the model is on a GPU.

    Raises:
        InputError: when its decoder layers cannot be compiled.
    """
    refuse_compiled(model)
    family = family_of(model)
    layers = list(family.decoder.layers)
    if family.lacks & {
        "softmax attention in every decoder layer",
        "decoder layers with keys and values, and no inputs but hidden states, of their own",
    }:
        kind = family.model.config.model_type
        raise InputError(f"decoder layers of {kind} models are not compiled; leave out compile")
    if getattr(family.model, "hf_quantizer", None) is not None:
        raise InputError("quantized decoder layers are not compiled; leave out compile")
    if any("forward" in vars(module) for layer in layers for module in layer.modules()):
        raise InputError(
            "decoder layers whose forward is replaced, as where a model is spread over devices, are not "
            "compiled; leave out compile"
        )
    check_layers(family)
    pads, local = family.device.type == "cuda" if pads is None else pads, threading.local()
    for number, layer in enumerate(layers):
        layer.forward = CompiledLayer(family, number, layer, pads, local)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
