"""Attention of Wings' learners and router, in plain PyTorch."""

from torch import Tensor

from vlm_prune.kernels.visible import at_least_fp32, share_heads, visible_softmax


def lorra_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_positions: Tensor,
    key_positions: Tensor,
    router: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Returns what `op.lorra_attention` describes, with the attention map in memory."""
    key, wide = share_heads(key, query), at_least_fp32(share_heads(value, query))
    scores = at_least_fp32(query) @ at_least_fp32(key).transpose(-1, -2) * scale
    weights = visible_softmax(scores, query_positions, key_positions)
    logits = weights.mean(1) @ at_least_fp32(router)
    return (weights @ wide).to(value.dtype), logits
