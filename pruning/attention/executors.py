"""Attention over kept blocks, computed in three ways.

`attend_reference` is the specification: it holds all products. `attend_gather` copies the kept blocks
of keys together and joins what a query pays to them with what it pays to its local region, by the
logarithms of the sums of exponentials that flash attention also returns. `attend_flex` is
FlexAttention, which skips blocks only where it is compiled.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vlm_prune.pruning.attention.blocks import KeptBlocks

Executor = Literal["auto", "reference", "gather", "flex"]


def attend_reference(
    query: Tensor, key: Tensor, value: Tensor, kept: KeptBlocks, scaling: float
) -> Tensor:
    """Returns attention (H, n, v) over kept blocks and local regions, holding all products.

    Args:
        query: (H, n, d).
        key: (G, n, d).
        value: (G, n, v).
        kept: which blocks each query block computes, the same for all, each group's or each head's.
        scaling: factor of the products.
    """
    heads, length = query.shape[:2]
    mask = token_mask(kept, length)
    # one mask for each query head, and keys and values of its group
    mask = mask.repeat_interleave(heads // len(mask), 0)
    key, value = (part.repeat_interleave(heads // len(part), 0) for part in (key, value))
    scores = query @ key.transpose(1, 2) * scaling
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.matmul(weights, value)


def token_mask(kept: KeptBlocks, length: int) -> Tensor:
    """Returns which keys each query sees, (R, n, n)."""
    geometry, index = kept.geometry, torch.arange(length, device=kept.keep.device)
    # every token gets what its block has; the last query block may be short
    mask = kept.keep.repeat_interleave(geometry.rows, 1)[:, :length]
    mask = mask.repeat_interleave(geometry.columns, 2)
    # kept keys are those of earlier regions; a token's own region is causal
    region = index // geometry.local
    own = (region == region[:, None]) & (index <= index[:, None])
    return (mask & (region < region[:, None])) | own


def attend_gather(
    query: Tensor, key: Tensor, value: Tensor, kept: KeptBlocks, scaling: float
) -> Tensor:
    """Returns attention (H, n, v) over kept blocks and local regions, reading no other keys.

    Args:
        query: (H, n, d).
        key: (G, n, d).
        value: (G, n, v).
        kept: which blocks each query block computes, the same for all, each group's or each head's.
        scaling: factor of the products.
    """
    geometry, length = kept.geometry, query.shape[1]
    output, sums = _local_regions(query, key, value, geometry.local, scaling)
    # one mask for the heads of a unit, which share their keys
    masks = kept.keep if len(kept.keep) > 1 else kept.keep.expand(len(key), -1, -1)
    grouped = query.unflatten(0, (len(masks), -1))
    outputs, all_sums = (part.unflatten(0, (len(masks), -1)) for part in (output, sums))
    for unit, mask in enumerate(masks):
        # the key head of this mask's heads, whose tokens are put side by side once: a model has
        # those of other heads between them
        own = unit * len(key) // len(masks)
        keys, values = (
            part[own].contiguous().unflatten(0, (-1, geometry.columns)) for part in (key, value)
        )
        counts, chosen = mask.sum(1).tolist(), mask.nonzero()[:, 1]
        # what is copied together is written over in turn, so that it stays in a CPU's cache
        most = max(counts)
        held_keys, held_values = (
            keys.new_empty(most, *keys.shape[1:]),
            values.new_empty(most, *values.shape[1:]),
        )
        position = 0
        for number, count in enumerate(counts):
            if not count:
                continue
            rows = slice(number * geometry.rows, min(length, (number + 1) * geometry.rows))
            index = chosen[position : (position := position + count)]
            near_keys = torch.index_select(keys, 0, index, out=held_keys[:count])
            near_values = torch.index_select(values, 0, index, out=held_values[:count])
            # rows of heads that share keys are rows of one head: (1, 1, H / units x rows, d)
            stacked = grouped[unit, :, rows]
            far, far_sums = attention_with_sums(
                stacked.flatten(0, 1)[None, None],
                near_keys.flatten(0, 1)[None, None],
                near_values.flatten(0, 1)[None, None],
                scaling,
                False,
            )
            near, near_sums = outputs[unit, :, rows], all_sums[unit, :, rows]
            # softmax over both parts: each weighs by its sum of exponentials
            weight = (far_sums.view(near_sums.shape) - near_sums).sigmoid_()[..., None]
            far = far.view(near.shape)
            if near.dtype == torch.float32:
                near.lerp_(far, weight)
            else:
                near.copy_(near.float().lerp_(far.float(), weight))
    return output


def _local_regions(
    query: Tensor, key: Tensor, value: Tensor, local: int, scaling: float
) -> tuple[Tensor, Tensor]:
    """Returns causal attention inside of local regions, (H, n, v), and its sums, (H, n).

    Args:
        query: (H, n, d).
        key: (G, n, d).
        value: (G, n, v).
        local: tokens of a region; the last one may be shorter.
        scaling: factor of the products.
    """
    (heads, length), shared = query.shape[:2], len(query) // len(key)
    output = query.new_empty(heads, length, value.shape[2])
    sums = torch.empty(heads, length, dtype=torch.float32, device=query.device)
    # whole regions in one batch, then the shorter one at the end
    whole = length // local * local
    for group in range(len(key)):
        # query heads of this key head
        own = slice(group * shared, (group + 1) * shared)
        for begin, end, size in ((0, whole, local), (whole, length, length - whole)):
            if begin == end:
                continue
            # regions are rows of a batch, (regions, heads, size, d)
            parts = [
                tensor[:, begin:end].unflatten(1, (-1, size)).transpose(0, 1)
                for tensor in (query[own], key[group, None], value[group, None])
            ]
            parts = [part.expand(-1, shared, -1, -1) for part in parts]
            near, near_sums = attention_with_sums(parts[0], parts[1], parts[2], scaling, True)
            output[own, begin:end] = near.transpose(0, 1).flatten(1, 2)
            sums[own, begin:end] = near_sums.transpose(0, 1).flatten(1, 2)
    return output, sums


def attend_tail(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Returns attention (H, t, v) of a prompt's last tokens to all keys up to their own.

    Args:
        query: of the last tokens, (H, t, d).
        key: of all tokens, (G, n, d).
        value: likewise, (G, n, v).
        scaling: factor of the products.
    """
    rows, before = query.shape[1], key.shape[1] - query.shape[1]
    output, sums = _local_regions(query, key[:, before:], value[:, before:], rows, scaling)
    if before:
        # (H, t, d) -> (G, 1, H / G x t, d): heads that share keys are rows of one head
        stacked = query.unflatten(0, (len(key), -1)).flatten(1, 2)[:, None]
        past = [tensor[:, None, :before] for tensor in (key, value)]
        far, far_sums = attention_with_sums(stacked, past[0], past[1], scaling, False)
        far, far_sums = far.reshape(output.shape), far_sums.reshape(sums.shape)
        output = torch.lerp(output.float(), far.float(), (far_sums - sums).sigmoid()[..., None])
    return output.to(query.dtype)


def attention_with_sums(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Returns attention (B, h, n, v) and the logarithm of the sum of exponentials of each query's
    products, (B, h, n) in fp32.

    Args:
        query: (B, h, n, d).
        key: (B, h, K, d).
        value: (B, h, K, v).
        scaling: factor of the products.
        causal: whether a query sees the keys up to its own index only.
    """
    flash = flash_with_sums(query.device.type)
    fits = query.shape[-1] == value.shape[-1] and (
        query.device.type == "cpu" or query.dtype in (torch.float16, torch.bfloat16)
    )
    if flash is not None and fits:
        output, sums = flash(query, key, value, causal, scaling)
        return output, sums.float()
    scores = (query @ key.transpose(-1, -2)).float() * scaling
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, -torch.inf)
    sums = scores.logsumexp(-1)
    return (scores - sums[..., None]).exp().to(value.dtype) @ value, sums


@lru_cache
def flash_with_sums(device: str) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """Returns torch's flash attention for a device, which also returns the
    logarithms of the rows' sums.

    None where this torch has none, or one with other results.
    """
    operators = torch.ops.aten

    def on_cpu(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Any:
        flash = operators._scaled_dot_product_flash_attention_for_cpu
        return flash(q, k, v, 0.0, causal, scale=scale)

    def on_gpu(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Any:
        flash = operators._scaled_dot_product_flash_attention
        return flash(q, k, v, 0.0, causal, scale=scale)[:2]

    found = {"cpu": on_cpu, "cuda": on_gpu}.get(device)
    if found is None:
        return None
    # the operators are private: one that has changed is not used
    draw = torch.Generator().manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.float16
    query, key = (
        torch.randn(1, 1, length, 32, generator=draw).to(device, dtype) for length in (3, 5)
    )
    try:
        output, sums = found(query, key, key, False, 0.3)
    except (RuntimeError, TypeError, AttributeError):
        return None
    scores = (query @ key.transpose(-1, -2)).float() * 0.3
    right = torch.allclose(sums.float(), scores.logsumexp(-1), rtol=1e-2, atol=1e-2)
    expected = scores.softmax(-1).to(dtype) @ key
    return found if right and torch.allclose(output, expected, rtol=1e-2, atol=1e-2) else None


def attend_flex(
    query: Tensor, key: Tensor, value: Tensor, kept: KeptBlocks, scaling: float
) -> Tensor:
    """Returns attention (H, n, v) over kept square blocks and local regions, by FlexAttention.

    Args:
        query: (H, n, d).
        key: (G, n, d).
        value: (G, n, v).
        kept: which blocks each query block computes, local regions being the blocks themselves.
        scaling: factor of the products.
    """
    call: Callable[..., Tensor] = _compiled_flex()
    mask = flex_mask(kept, len(query), query.shape[1])
    parts = (query[None], key[None], value[None])
    return call(*parts, block_mask=mask, scale=scaling, enable_gqa=len(query) != len(key))[0]


@lru_cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=None)


def flex_mask(kept: KeptBlocks, heads: int, length: int) -> Any:
    """Returns a mask of FlexAttention, of H heads.

    Its function looks blocks up, too: FlexAttention that is not compiled ignores the lists.

    Args:
        kept: square blocks.
        heads: of queries.
        length: of the prompt.
    """
    from torch.nn.attention.flex_attention import BlockMask

    block, keep = kept.geometry.block, kept.keep
    # (H, blocks, blocks)
    keep = keep.repeat_interleave(heads // len(keep), 0)
    blocks = keep.shape[-1]
    index = torch.arange(blocks, dtype=torch.int32, device=keep.device)
    # blocks that are kept whole, first in each row of indices; each block's own is causal
    counts = keep.sum(-1, dtype=torch.int32)
    order = keep.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    own = torch.zeros(heads, blocks, blocks, dtype=torch.int32, device=keep.device)
    own[..., 0] = index
    table = keep | torch.eye(blocks, dtype=torch.bool, device=keep.device)

    def seen(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return (row >= column) & table[head, row // block, column // block]

    return BlockMask.from_kv_blocks(
        torch.ones_like(counts)[None], own[None], counts[None], order[None],
        BLOCK_SIZE=(block, block), mask_mod=seen, seq_lengths=(length, length),
        compute_q_blocks=False,
    )  # fmt: skip


def attend_dense(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Returns causal attention (H, n, v) of a prompt without padding.

    Args:
        query: (H, n, d).
        key: (G, n, d).
        value: (G, n, v).
        scaling: factor of the products.
    """
    return scaled_dot_product_attention(
        query[None], key[None], value[None], is_causal=True, scale=scaling,
        enable_gqa=len(query) != len(key),
    )[0]  # fmt: skip


EXECUTORS: dict[str, Callable[..., Tensor]] = {
    "reference": attend_reference,
    "gather": attend_gather,
    "flex": attend_flex,
}
