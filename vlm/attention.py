"""Queries and keys of one layer, from its input."""

import sys
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.tokens import rows_at, take

SPARSE = "vlm_prune_sparse"
"""Name of the attention that `sparse_attention` puts in SDPA's place."""


def encoder_query_key(layer: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Returns queries and keys (M, H, N, d) of a CLIP or SigLIP encoder
    layer given its input (M, N, D).
    """
    attention, normed = layer.self_attn, layer.layer_norm1(hidden_states)
    query, key = attention.q_proj(normed), attention.k_proj(normed)
    return in_heads(query, attention.head_dim), in_heads(key, attention.head_dim)


def scored_query_key(
    layer: Any, output: Any, state: int, rows: slice | list[int] = slice(None)
) -> tuple[Tensor, Tensor]:
    """Returns queries and keys (M, H, N, d) of a CLIP or SigLIP encoder layer as it computed them, or
    computes them again.

    Args:
        layer: the layer.
        output: of `Family.run`.
        state: number of the hidden state that the layer got.
        rows: which images or tiles.
    """
    at = rows if isinstance(rows, slice) else rows_at(rows)
    if output.projections is None:
        return encoder_query_key(layer, output.hidden_states[state][at])
    query, key = (in_heads(seen[at], layer.self_attn.head_dim) for seen in output.projections)
    return query, key


def in_heads(values: Tensor, width: int) -> Tensor:
    """Splits values into heads of width d, (M, N, H d) -> (M, H, N, d)."""
    heads: Tensor = values.unflatten(-1, (-1, width))
    return heads.transpose(1, 2)


def decoder_keys(layer: Any, hidden_states: Tensor) -> Tensor:
    """Returns a Llama-style layer's keys before their norm, if any, and before
    rotation, heads side by side.

    Shapes: (B, L, D) -> (B, L, d).
    """
    keys: Tensor = layer.self_attn.k_proj(layer.input_layernorm(hidden_states))
    return keys


def decoder_query_key(
    layer: Any, hidden_states: Tensor, rotary: tuple[Tensor, Tensor], index: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the queries (B, H, T, d) of chosen rows and all keys (B, G, L, d) of a Llama-style
    layer, after rotation.

    Args:
        layer: the decoder layer.
        hidden_states: its input, (B, L, D).
        rotary: cos and sin, (B, L, d) each.
        index: token indices of the rows, (B, T).
    """
    attention, width = layer.self_attn, layer.self_attn.head_dim
    normed = layer.input_layernorm(hidden_states)
    chosen = take(normed, index)
    # (B, L, G d) -> (B, G, L, d)
    key = attention.k_proj(normed).unflatten(-1, (-1, width)).transpose(1, 2)
    heads = key.shape[1] * attention.num_key_value_groups
    # Qwen3.5 has a gate behind each head's query
    query = attention.q_proj(chosen).unflatten(-1, (heads, -1))[..., :width].transpose(1, 2)
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    # one table for all rows becomes one for each, of which queries take theirs
    cos, sin = (table.expand(len(hidden_states), -1, -1) for table in rotary)
    # some models turn pairs of neighbors, or part of a head only
    modeling = sys.modules[type(attention).__module__]
    turn = getattr(modeling, "apply_rotary_pos_emb", apply_rotary_pos_emb)
    if "k" not in signature(turn).parameters:
        return turn(query, take(cos, index), take(sin, index)), turn(key, cos, sin)
    query, _ = turn(query, query, take(cos, index), take(sin, index))
    key, _ = turn(key, key, cos, sin)
    return query, key


def turns_neighbors(layer: Any) -> bool:
    """Returns whether a layer's rotation turns neighbors in a head's width, not its two halves."""
    modeling = sys.modules[type(layer.self_attn).__module__]
    turn = getattr(modeling, "apply_rotary_pos_emb", apply_rotary_pos_emb)
    # a quarter turn of the first number of a head moves it to its partner
    query = torch.zeros(1, 1, 1, 8)
    query[..., 0] = 1
    cos, sin = torch.zeros(1, 1, 8), torch.ones(1, 1, 8)
    both = "k" in signature(turn).parameters
    turned = turn(query, query, cos, sin)[0] if both else turn(query, cos, sin)
    return bool(turned[0, 0, 0].abs().argmax() == 1)


def expanded_mask(valid: Tensor) -> Tensor:
    """Returns the causal mask (B, 1, K, K) of prompts with padding, true where `valid` (B, K) is."""
    length = valid.shape[1]
    # (K, K) & (B, 1, 1, K): nobody sees padding
    seen = torch.ones(length, length, dtype=torch.bool, device=valid.device).tril()
    return seen & valid[:, None, None].bool()


def mask_kind(config: Any, number: int) -> str:
    """Returns the kind of attention of decoder layer `number`: full, or within a sliding window."""
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return str(kinds[number])
    sliding = getattr(config, "sliding_window", None) is not None
    return "sliding_attention" if sliding else "full_attention"


def window_of(config: Any, number: int) -> int | None:
    """Returns how many tokens back a query of decoder layer `number` sees, its own among them; None
    for all.

    Raises:
        InputError: if the layer attends in another way, so that its attention cannot be scored.
    """
    kind = mask_kind(config, number)
    if kind == "full_attention":
        return None
    if kind == "sliding_attention":
        return int(config.sliding_window)
    raise InputError(
        f"decoder layer {number} has {kind}, and scores of attention need full or sliding attention; "
        "those of all layers are not known here"
    )


def scored_layers(config: Any, layers: int) -> list[int]:
    """Returns the decoder layers whose attention methods can read: all but those of linear attention.

    Args:
        config: of the language model.
        layers: how many it has.
    """
    return [number for number in range(layers) if mask_kind(config, number) != "linear_attention"]
