"""Sums of attention weights over chosen keys, read by the model's own fused kernel.

The attention that a token pays to keys, weighted by a number for each key, is attention with
those numbers as values. So it needs no attention maps, and SDPA, FlashAttention and the KV cache
stay on. On a CPU the columns ride along in the model's own call, as values beside its values.
Kernels round a wider head differently; so while all columns are zero, as an untrained router's are,
and wherever asking that would make a GPU wait, they have a call of their own and the model's output
does not move by a bit.
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


def padded(columns: int) -> int:
    """Columns that ride along for so many: a width that vectors divide."""
    return -(-columns // 8) * 8


@dataclass
class Reader:
    """Columns (B, N, C); `result` is sum_j a_ij columns_jc, (B, S, C).

    The attention weights a are averaged over heads. All columns of a call fit into a head's width.
    """

    columns: Tensor
    result: Tensor | None = None


def watch(attention: Any, kwargs: dict[str, Any], reader: Reader) -> dict[str, Any]:
    """From a forward pre-hook of an attention module: have `reader.result` filled by this call."""
    ALL_ATTENTION_FUNCTIONS.register(NAME, _attend)
    if attention.config._attn_implementation != NAME:
        routed = copy.copy(attention.config)
        routed._attn_implementation_internal, routed.plain = NAME, attention.config
        attention.config = routed
    return kwargs | {"readers": (*kwargs.get("readers", ()), reader)}


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    readers: tuple[Reader, ...] = (),
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    module.config = module.config.plain
    eager = sys.modules[type(module).__module__].eager_attention_forward
    kernel = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager)
    columns = torch.cat([reader.columns for reader in readers], -1).to(value.dtype)
    columns = columns[:, None].expand(-1, key.shape[1], -1, -1)
    count, width = columns.shape[-1], value.shape[-1]
    if key.device.type == "cpu" and not kwargs.get("dropout") and columns.any():
        # kernels want queries, keys and values of one width
        more = padded(count)
        query, key = F.pad(query, (0, more)), F.pad(key, (0, more))
        value = torch.cat([value, F.pad(columns, (0, more - count))], -1)
        both, maps = kernel(module, query, key, value, attention_mask, **kwargs)
        output, read = both[..., :width], both[..., width : width + count]
    else:
        output, maps = kernel(module, query, key, value, attention_mask, **kwargs)
        columns = F.pad(columns, (0, width - count))
        alone, _ = kernel(module, query, key, columns, attention_mask, **kwargs | {"dropout": 0.0})
        read = alone[..., :count]
    parts = read.mean(2).split([reader.columns.shape[-1] for reader in readers], -1)
    for reader, part in zip(readers, parts, strict=True):
        reader.result = part
    return output, maps
