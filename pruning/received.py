"""Attention that image tokens receive, from the queries and keys that the model hands out."""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from vlm_prune.kernels.attention_received import attention_received
from vlm_prune.vlm.tokens import AttentionRows, DecoderTokens, VisionTokens

Queries = Literal["all", "patches", "cls"]


def in_tower(vision: VisionTokens, queries: Queries) -> Tensor:
    """Returns the mean attention that each token receives over heads and the given queries, (M, N).

    It is that of the layer whose output is `features`.

    In a tower without a CLS token `cls` means all tokens, as VisionZip's authors do for Qwen2.5-VL.
    A tile's tokens receive attention from that tile alone.
    """
    first = int(vision.has_cls)
    rows = {"all": slice(None), "patches": slice(first, None), "cls": slice(0, first or None)}[
        queries
    ]
    # frames do not attend to each other: one at a time holds little at once
    count = len(vision.projected) * vision.frames
    parts: Iterable[tuple[Tensor, Tensor]] = (vision.query_key_of([n]) for n in range(count))
    if not vision.frames:
        parts = [vision.query_key()]
    received = torch.cat([attention_received(query[:, :, rows], key) for query, key in parts])
    received = received[:, first:]
    return vision.pooled(received[..., None])[..., 0]


def in_decoder(tokens: DecoderTokens, query_mask: Tensor) -> Tensor:
    """Returns the mean attention over heads and the question tokens where
    `query_mask` (M, T) is true; (M, n).
    """
    rows = tokens.question_rows(slice(-query_mask.shape[1], None))
    return from_rows(rows, torch.where(query_mask, rows.columns, -1))


def from_rows(rows: AttentionRows, columns: Tensor) -> Tensor:
    """Returns the mean attention over heads and the queries that stand at `columns`
    (M, T), -1 for none; (M, n).
    """
    scores = attention_received(
        rows.query, rows.key, columns, rows.key_positions, rows.scale, rows.window
    )
    return scores.gather(1, rows.image)
