"""Attention that image tokens receive, from the queries and keys that the model hands out."""

from typing import Literal

import torch
from torch import Tensor

from vlm_prune.kernels.attention_received import attention_received
from vlm_prune.vlm.tokens import AttentionRows, DecoderTokens, VisionTokens

Queries = Literal["all", "patches", "cls"]
FRAMES = 8


def in_tower(vision: VisionTokens, queries: Queries) -> Tensor:
    """Mean over heads and the given queries, in the layer whose output is `features`; (M, N).

    In a tower without a CLS token `cls` means all tokens, as VisionZip's authors do for Qwen2.5-VL.
    A tile's tokens receive attention from that tile alone.
    """
    query, key = vision.query_key()
    first = int(vision.has_cls)
    rows = {"all": slice(None), "patches": slice(first, None), "cls": slice(0, first or None)}
    # frames do not attend to each other: a few at a time hold little attention at once
    together = FRAMES if vision.frames else len(query)
    parts = zip(query[:, :, rows[queries]].split(together), key.split(together), strict=True)
    received = torch.cat([attention_received(*part) for part in parts])[:, first:]
    return vision.pool(received[..., None])[..., 0]


def in_decoder(tokens: DecoderTokens, query_mask: Tensor) -> Tensor:
    """Mean over heads and the question tokens where `query_mask` (M, T) is true; (M, n)."""
    rows = tokens.question_rows(slice(-query_mask.shape[1], None))
    return from_rows(rows, torch.where(query_mask, rows.columns, -1))


def from_rows(rows: AttentionRows, columns: Tensor) -> Tensor:
    """Mean over heads and the queries that stand at `columns` (M, T), -1 for none; (M, n)."""
    scores = attention_received(
        rows.query, rows.key, columns, rows.key_positions, rows.scale, rows.window
    )
    return scores.gather(1, rows.image)
