"""Attention of Wings' learners and router, dispatched."""

from torch import Tensor

from vlm_prune.kernels.dispatch import implementation


def lorra_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_positions: Tensor,
    key_positions: Tensor,
    router: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention in which a query sees the keys at its own position or before, with gradients.

    https://arxiv.org/abs/2406.03496

    A query that sees no key gets zeros. The released code masks by column instead of position,
    which lets text see the future; a uniform row in place of the zeros would leak it again.

    Shapes: query (B, H, S, d), key (B, G, N, d), value (B, G, N, e) with H a multiple of G,
    query_positions (B, S), key_positions (B, N), negative at padding, router (B, N, R)
    -> attended (B, H, S, e) in value's dtype, logits (B, S, R) in at least fp32.

    Args:
        router: columns that are values of every head, too; `logits` is their mean over heads,
            which is the router's linear map of the head-averaged attention row, without a map.
        scale: factor of the products; d ** -0.5 by default.
    """
    if router is None:
        router = value.new_zeros(value.shape[0], value.shape[2], 0)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    both: tuple[Tensor, Tensor] = implementation("lorra_attention", query).lorra_attention(
        query, key, value, query_positions, key_positions, router, factor
    )
    return both
