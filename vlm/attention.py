"""Attention scores for the rows that a pruner needs, from queries and keys, never an L x L map."""

from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


def received(query: Tensor, key: Tensor, rows: slice, block: int = 64) -> Tensor:
    """Mean over heads and query rows of softmax attention, fp32.

    Shapes: query, key (M, H, N, d) -> (M, N). `rows` chooses the queries; `block` rows of the
    map exist at a time.
    """
    query, key = query[:, :, rows].float() * query.shape[-1] ** -0.5, key.float()
    total = torch.zeros(key.shape[0], key.shape[2], device=key.device)
    for start in range(0, query.shape[2], block):
        weights = (query[:, :, start : start + block] @ key.transpose(-1, -2)).softmax(-1)
        total += weights.sum(dim=(1, 2))
    return total / (query.shape[1] * query.shape[2])


def encoder_query_key(layer: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys (M, H, N, d) of a CLIP or SigLIP encoder layer given its input (M, N, D)."""
    attention, normed = layer.self_attn, layer.layer_norm1(hidden)
    shape = (*hidden.shape[:2], -1, attention.head_dim)
    return (
        attention.q_proj(normed).view(shape).transpose(1, 2),
        attention.k_proj(normed).view(shape).transpose(1, 2),
    )


def decoder_rows(
    layer: Any,
    hidden: Tensor,
    rotary: tuple[Tensor, Tensor],
    index: Tensor,
    index_valid: Tensor,
    key_valid: Tensor,
) -> Tensor:
    """Causal attention of chosen query rows over all keys in a Llama-style layer, fp32.

    Shapes: hidden (B, L, D), rotary cos and sin (B, L, d), index (B, T) query rows, index_valid
    (B, T), key_valid (B, L) -> (B, H, T, L). Rows of invalid queries are zero.
    """
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)
    chosen = normed.gather(1, index[..., None].expand(-1, -1, normed.shape[-1]))
    query = attention.q_proj(chosen).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
    key = attention.k_proj(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    cos, sin = (table.expand(len(hidden), -1, -1) for table in rotary)
    places = index[..., None].expand(-1, -1, cos.shape[-1])
    query, _ = apply_rotary_pos_emb(query, query, cos.gather(1, places), sin.gather(1, places))
    key, _ = apply_rotary_pos_emb(key, key, cos, sin)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query.float() @ key.float().transpose(-1, -2) * attention.scaling
    columns = torch.arange(hidden.shape[1], device=hidden.device)
    visible = (columns <= index[..., None]) & key_valid[:, None]
    scores = scores.masked_fill(~visible[:, None], torch.finfo(scores.dtype).min)
    weights: Tensor = scores.softmax(-1) * (visible & index_valid[..., None])[:, None]
    return weights
