"""Attention received, dispatched."""

from torch import Tensor

from vlm_prune.kernels.dispatch import implementation


def attention_received(
    query: Tensor,
    key: Tensor,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Returns the mean over heads and queries of the softmax attention that each key receives.

    Shapes: query (B, H, T, d), key (B, G, N, d) with H a multiple of G, query_positions (B, T),
    key_positions (B, N) -> (B, N), in at least fp32. No T x N map is held in memory.

    Args:
        query: after the position rotation.
        key: likewise.
        query_positions: with `key_positions`, a query sees the keys at its position or before;
            negative positions are padding and count nowhere. Without both, all see all.
        key_positions: of the keys, see `query_positions`.
        scale: factor of the products; d ** -0.5 by default.
        window: how many positions a query sees, its own among them; None for all.

    Raises:
        ValueError: for a window or one kind of positions without the other.
    """
    if (query_positions is None) != (key_positions is None):
        raise ValueError("give query_positions and key_positions together, or neither")
    if window is not None and query_positions is None:
        raise ValueError("a window needs query_positions and key_positions")
    module = implementation("attention_received", query)
    received: Tensor = module.attention_received(
        query, key, query_positions, key_positions, scale, window
    )
    return received
