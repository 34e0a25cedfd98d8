"""Sums of attention weights over chosen keys, read by the model's own fused kernel.

The attention that a token pays to keys, weighted by a number for each key, is attention with
those numbers as values. So it needs no attention maps, and SDPA, FlashAttention and the KV cache
stay on. The columns are the values of a second call over the same queries and keys: appending them
to the values of the first would be cheaper, but kernels round a wider head differently, and
the model's own output must not move by a bit.
"""

import copy
import sys
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "vlm_prune_columns"


@dataclass
class Reader:
    """Columns (B, N, C), C at most a head's width; `result` is sum_j a_ij columns_jc, (B, S, C).

    The attention weights a are averaged over heads.
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
    output: tuple[Tensor, Tensor | None] = kernel(
        module, query, key, value, attention_mask, **kwargs
    )
    for reader in readers:
        width = reader.columns.shape[-1]
        columns = F.pad(reader.columns.to(value.dtype), (0, value.shape[-1] - width))
        columns = columns[:, None].expand(-1, key.shape[1], -1, -1)
        read, _ = kernel(module, query, key, columns, attention_mask, **kwargs | {"dropout": 0.0})
        reader.result = read[..., :width].mean(2)
    return output
