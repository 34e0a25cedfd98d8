"""Sums of attention weights over chosen keys, read by the model's own fused kernel.

The attention that a token pays to keys, weighted by a number for each key, is attention with
those numbers as values. So it needs no attention maps, and SDPA, FlashAttention and the KV cache
stay on. On a CPU the columns are appended to the values of the model's own call, or,
when decoding, where that would copy the cache, weighted by the attention of the one query. This rounds
differently; so while all columns are zero, as an untrained router's are, and wherever asking that
would make a GPU wait, they have a call of their own and the model's output does not move by a bit.
"""

import copy
import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "vlm_prune_columns"


def padded_columns(columns: int) -> int:
    """Returns how many columns are appended to hold `columns` of them: the next
    multiple of 8, for vector units.
    """
    return -(-columns // 8) * 8


@dataclass
class ColumnSum:
    """Columns (B, N, C); `result` is sum_j a_ij columns_jc, (B, S, C).

    The attention weights a are averaged over heads. All columns of a call fit into a head's width.
    """

    columns: Tensor
    result: Tensor | None = None


class Route:
    """Attention of a module that computes the sums that a call asks for, until `remove`.

    The module gets a configuration of its own that names our attention function. It stays there
    between calls, so that nothing is left behind where a call fails; without sums the function is
    the model's own.
    """

    def __init__(self, attention: Any) -> None:
        ALL_ATTENTION_FUNCTIONS.register(NAME, _attend)
        self.attention, self.plain = attention, None
        if attention.config._attn_implementation != NAME:
            self.plain = attention.config
            attention.config = copy.copy(self.plain)
            attention.config._attn_implementation_internal = NAME
            attention.config.plain = self.plain

    def remove(self) -> None:
        """Gives the module its configuration back; an outer route stays."""
        if self.plain is not None:
            self.attention.config, self.plain = self.plain, None


def with_column_sum(kwargs: dict[str, Any], column_sum: ColumnSum) -> dict[str, Any]:
    """Makes this call of a routed attention module fill `column_sum.result`.

    It is for forward pre-hooks: returns the keyword arguments `kwargs` with the sum among them.
    """
    return kwargs | {"column_sums": (*kwargs.get("column_sums", ()), column_sum)}


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    column_sums: tuple[ColumnSum, ...] = (),
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attends as the module's own function does, and fills the sums that the call asks for.

    Args:
        module: the routed attention module.
        query: (B, H, S, d).
        key: (B, G, N, d).
        value: (B, G, N, d).
        attention_mask: as the module's own function takes it.
        column_sums: to fill.
        kwargs: of the call.
    """
    # the module's own function runs under its own name
    routed = module.config
    module.config = routed.plain  # kernels look up there which of them they are
    try:
        eager = sys.modules[type(module).__module__].eager_attention_forward
        kernel = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager)
        if column_sums:
            return _read(kernel, module, query, key, value, attention_mask, column_sums, **kwargs)
        found: tuple[Tensor, Tensor | None] = kernel(
            module, query, key, value, attention_mask, **kwargs
        )
        return found
    finally:
        module.config = routed


def _read(
    kernel: Any,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    column_sums: tuple[ColumnSum, ...],
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attends, and fills sums by giving their columns to the kernel beside or behind the values.

    Args:
        kernel: the module's own attention function.
        module: the attention module.
        query: (B, H, S, d).
        key: (B, G, N, d).
        value: (B, G, N, d).
        attention_mask: as the kernel takes it.
        column_sums: to fill.
        kwargs: of the call.
    """
    brought = [column_sum.columns for column_sum in column_sums]
    columns = (brought[0] if len(brought) == 1 else torch.cat(brought, -1)).to(value.dtype)
    count, width = columns.shape[-1], value.shape[-1]
    maps = None
    if key.device.type != "cpu" or kwargs.get("dropout") or not columns.any():
        output, maps = kernel(module, query, key, value, attention_mask, **kwargs)
        # a call of its own, with the columns as values of every head
        alone = _per_head(F.pad(columns, (0, width - count)), key)
        read, _ = kernel(module, query, key, alone, attention_mask, **kwargs | {"dropout": 0.0})
        read = read[..., :count].mean(2)
    elif query.shape[2] == 1 and module.config._attn_implementation == "sdpa":
        # one query: its weights (B, G, H / G, N) serve values and columns alike
        weights = weights_of_one(query, key, attention_mask, kwargs["scaling"])
        output = (weights @ value).flatten(1, 2)[:, None]
        read = (weights.flatten(1, 2) @ columns).mean(1, keepdim=True)
    else:
        # kernels want queries, keys and values of one width
        more = padded_columns(count)
        wide = torch.cat([value, _per_head(F.pad(columns, (0, more - count)), key)], -1)
        query, key = F.pad(query, (0, more)), F.pad(key, (0, more))
        both, maps = kernel(module, query, key, wide, attention_mask, **kwargs)
        output, read = both[..., :width], both[..., width : width + count].mean(2)
    # each caller gets the columns that it brought
    parts = read.split([column_sum.columns.shape[-1] for column_sum in column_sums], -1)
    for column_sum, part in zip(column_sums, parts, strict=True):
        column_sum.result = part
    return output, maps


def _per_head(columns: Tensor, key: Tensor) -> Tensor:
    """Repeats columns for the G heads of keys, (B, N, C) -> (B, G, N, C)."""
    return columns[:, None].expand(-1, key.shape[1], -1, -1)


def weights_of_one(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Returns the attention weights of one query, by groups of heads that share keys, (B, G, H / G,
    N).

    Args:
        query: (B, H, 1, d), after the position rotation.
        key: (B, G, N, d), likewise.
        mask: (B, 1, 1, N), bool or additive; None sees all.
        scaling: factor of the products.
    """
    batch, groups = key.shape[:2]
    # heads that share keys are rows of one product
    rows = query.reshape(batch * groups, -1, query.shape[-1]), key.flatten(0, 1).transpose(1, 2)
    scores = torch.baddbmm(query.new_zeros(()), *rows, beta=0, alpha=scaling)
    scores = scores.unflatten(0, (batch, groups))
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    weights: Tensor = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return weights
