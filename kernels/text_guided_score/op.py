"""AdaptInfer's text-guided score, dispatched."""

from torch import Tensor

from vlm_prune.kernels.dispatch import implementation


def text_guided_score(
    query: Tensor,
    key: Tensor,
    columns: Tensor,
    key_valid: Tensor,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Returns the score s[v] = sum over heads h and text rows j of
    p_h[j] A_h[j, v] of each token v.

    https://arxiv.org/abs/2508.06084

    A is the causal attention of the text rows, p the column sums of the symmetrized text-to-text
    part A + A^T - diag(A). Only text rows are computed, T x L per head instead of L x L.

    Shapes: query (B, H, T, d) and key (B, G, L, d) after the position rotation, H a multiple of G,
    columns (B, T), key_valid (B, L) -> (B, L), in at least fp32, zero at invalid keys.

    Args:
        query: of the text rows.
        key: of all tokens.
        columns: where in 0..L-1 each text row stands, valid keys in rising order; -1 is padding.
        key_valid: which keys are no padding.
        scale: factor of the products.
        window: how many keys back a row sees, its own among them; None for all.
    """
    module = implementation("text_guided_score", query)
    score: Tensor = module.text_guided_score(query, key, columns, key_valid, scale, window)
    return score
