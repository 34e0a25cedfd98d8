"""Learner attention: one launch forward, two backward; attention is recomputed, never stored."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlm_prune.kernels.attention_tiles import (
    block_size,
    load_tile,
    query_tile,
    seen_until,
    tile_dtype,
    tile_width,
    unseen_before,
    visible_logits,
)
from vlm_prune.kernels.lorra_attention import reference

# Largest tiles, and warps: the fastest tried for heads of 128 columns on an H200.
HALF_PRECISION = {"BLOCK_T": 64, "BLOCK_N": 32, "num_warps": 4}
FULL_PRECISION = {"BLOCK_T": 32, "BLOCK_N": 32, "num_warps": 4}


@triton.jit
def _forward_kernel(
    query, key, value, router, query_positions, key_positions, out, routed, lse,
    query_strides, key_strides, value_strides, router_strides,
    scale, heads, group, queries, keys, width, value_width, routes,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """One program: a tile of queries of one head, with a running softmax over the keys."""
    line = tl.program_id(1).to(tl.int64)
    batch, head = line // heads, line % heads
    rows, real, query_at, q = query_tile(
        query, query_positions, query_strides, batch, head, queries, width, BLOCK_T, BLOCK_D, DTYPE
    )
    key += batch * key_strides[0] + head // group * key_strides[1]
    value += batch * value_strides[0] + head // group * value_strides[1]
    router += batch * router_strides[0]
    high = tl.full([BLOCK_T], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    attended = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    logits = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    until = seen_until(key_positions, batch * keys, keys, tl.max(query_at, 0), 1024)
    for start in range(0, until, BLOCK_N):
        key_index = start + tl.arange(0, BLOCK_N)
        inside = key_index < keys
        key_at = tl.load(key_positions + batch * keys + key_index, mask=inside, other=-1)
        k = load_tile(key, key_index, inside, key_strides, width, BLOCK_D).to(DTYPE)
        v = load_tile(value, key_index, inside, value_strides, value_width, BLOCK_E).to(DTYPE)
        r = load_tile(router, key_index, inside, router_strides, routes, BLOCK_R).to(DTYPE)
        scores = visible_logits(q, query_at, k, key_at, scale)
        top = tl.maximum(high, tl.max(scores, 1))
        base = tl.where(top == float("-inf"), 0.0, top)
        fade, weights = tl.exp(high - base), tl.exp(scores - base[:, None])
        total = total * fade + tl.sum(weights, 1)
        weights = weights.to(DTYPE)
        attended = attended * fade[:, None] + tl.dot(weights, v, input_precision="ieee")
        logits = logits * fade[:, None] + tl.dot(weights, r, input_precision="ieee")
        high = top
    some = tl.where(total > 0, total, 1.0)
    tl.store(lse + line * queries + rows, tl.where(total > 0, high + tl.log(some), float("inf")),
             mask=real)  # fmt: skip
    columns, lanes = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_R)
    out += (line * queries + rows[:, None]) * value_width + columns[None, :]
    tl.store(out, attended / some[:, None], mask=real[:, None] & (columns < value_width)[None, :])
    routed += (line * queries + rows[:, None]) * routes + lanes[None, :]
    tl.store(routed, logits / some[:, None], mask=real[:, None] & (lanes < routes)[None, :])


@triton.jit
def _slopes(
    query, query_at, key, key_at, value, router, out_slope, routed_slope, lse, delta, scale,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Attention of a tile and the gradient of its scaled products, both (queries, keys)."""
    weights = tl.exp(visible_logits(query, query_at, key, key_at, scale) - lse[:, None])
    slope = tl.dot(out_slope, tl.trans(value), input_precision="ieee")
    slope += tl.dot(routed_slope, tl.trans(router), input_precision="ieee")
    return weights.to(DTYPE), (weights * (slope - delta[:, None]) * scale).to(DTYPE)


@triton.jit
def _query_slope_kernel(
    query, key, value, router, query_positions, key_positions,
    out_slope, routed_slope, lse, delta, query_slope,
    query_strides, key_strides, value_strides, router_strides, out_strides, routed_strides,
    scale, heads, group, queries, keys, width, value_width, routes,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of a tile of queries of one head."""
    line = tl.program_id(1).to(tl.int64)
    batch, head = line // heads, line % heads
    rows, real, query_at, q = query_tile(
        query, query_positions, query_strides, batch, head, queries, width, BLOCK_T, BLOCK_D, DTYPE
    )
    key += batch * key_strides[0] + head // group * key_strides[1]
    value += batch * value_strides[0] + head // group * value_strides[1]
    router += batch * router_strides[0]
    out_slope += batch * out_strides[0] + head * out_strides[1]
    routed_slope += batch * routed_strides[0]
    from_out = load_tile(out_slope, rows, real, out_strides, value_width, BLOCK_E).to(DTYPE)
    from_routed = load_tile(routed_slope, rows, real, routed_strides, routes, BLOCK_R).to(DTYPE)
    normalizer = tl.load(lse + line * queries + rows, mask=real, other=float("inf"))
    shift = tl.load(delta + line * queries + rows, mask=real, other=0.0)
    total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    until = seen_until(key_positions, batch * keys, keys, tl.max(query_at, 0), 1024)
    for start in range(0, until, BLOCK_N):
        key_index = start + tl.arange(0, BLOCK_N)
        inside = key_index < keys
        key_at = tl.load(key_positions + batch * keys + key_index, mask=inside, other=-1)
        k = load_tile(key, key_index, inside, key_strides, width, BLOCK_D).to(DTYPE)
        v = load_tile(value, key_index, inside, value_strides, value_width, BLOCK_E).to(DTYPE)
        r = load_tile(router, key_index, inside, router_strides, routes, BLOCK_R).to(DTYPE)
        _, slope = _slopes(
            q, query_at, k, key_at, v, r, from_out, from_routed, normalizer, shift, scale, DTYPE
        )
        total += tl.dot(slope, k, input_precision="ieee")
    columns = tl.arange(0, BLOCK_D)
    query_slope += (line * queries + rows[:, None]) * width + columns[None, :]
    tl.store(query_slope, total, mask=real[:, None] & (columns < width)[None, :])


@triton.jit
def _key_slope_kernel(
    query, key, value, router, query_positions, key_positions,
    out_slope, routed_slope, lse, delta, key_slope, value_slope, router_slope,
    query_strides, key_strides, value_strides, router_strides, out_strides, routed_strides,
    scale, heads, group, queries, keys, width, value_width, routes,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """One program: the gradients of a tile of keys of one group, over all its heads."""
    line, groups = tl.program_id(1).to(tl.int64), heads // group
    batch, shared = line // groups, line % groups
    key_index = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = key_index < keys
    key_at = tl.load(key_positions + batch * keys + key_index, mask=inside, other=-1)
    key += batch * key_strides[0] + shared * key_strides[1]
    value += batch * value_strides[0] + shared * value_strides[1]
    router += batch * router_strides[0]
    routed_slope += batch * routed_strides[0]
    k = load_tile(key, key_index, inside, key_strides, width, BLOCK_D).to(DTYPE)
    v = load_tile(value, key_index, inside, value_strides, value_width, BLOCK_E).to(DTYPE)
    r = load_tile(router, key_index, inside, router_strides, routes, BLOCK_R).to(DTYPE)
    of_key = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    of_value = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    of_router = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    lowest = tl.min(tl.where(key_at >= 0, key_at, 2147483647), 0)
    after = unseen_before(query_positions, batch * queries, queries, lowest, 1024)
    after = after // BLOCK_T * BLOCK_T
    for head in range(shared * group, (shared + 1) * group):
        row = batch * heads + head
        head_query = query + batch * query_strides[0] + head * query_strides[1]
        head_slope = out_slope + batch * out_strides[0] + head * out_strides[1]
        for start in range(after, queries, BLOCK_T):
            rows = start + tl.arange(0, BLOCK_T)
            real = rows < queries
            query_at = tl.load(query_positions + batch * queries + rows, mask=real, other=-1)
            q = load_tile(head_query, rows, real, query_strides, width, BLOCK_D).to(DTYPE)
            from_out = load_tile(head_slope, rows, real, out_strides, value_width, BLOCK_E)
            from_routed = load_tile(routed_slope, rows, real, routed_strides, routes, BLOCK_R)
            from_out, from_routed = from_out.to(DTYPE), from_routed.to(DTYPE)
            normalizer = tl.load(lse + row * queries + rows, mask=real, other=float("inf"))
            shift = tl.load(delta + row * queries + rows, mask=real, other=0.0)
            weights, slope = _slopes(
                q, query_at, k, key_at, v, r, from_out, from_routed, normalizer, shift, scale, DTYPE
            )
            of_key += tl.dot(tl.trans(slope), q, input_precision="ieee")
            of_value += tl.dot(tl.trans(weights), from_out, input_precision="ieee")
            of_router += tl.dot(tl.trans(weights), from_routed, input_precision="ieee")
    columns, outputs = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    lanes, at = tl.arange(0, BLOCK_R), line * keys + key_index[:, None]
    inside = inside[:, None]
    tl.store(key_slope + at * width + columns, of_key, mask=inside & (columns < width))
    tl.store(value_slope + at * value_width + outputs, of_value,
             mask=inside & (outputs < value_width))  # fmt: skip
    tl.store(router_slope + at * routes + lanes, of_router, mask=inside & (lanes < routes))


class _LorraAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_at: Tensor,
        key_at: Tensor,
        router: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        batch, heads, queries, _ = query.shape
        out = value.new_empty(batch, heads, queries, value.shape[3])
        routed = torch.empty(batch, heads, queries, router.shape[2], device=query.device)
        lse = torch.empty(batch, heads, queries, device=query.device)
        sizes, blocks = _sizes(query, key, value, router)
        _forward_kernel[(triton.cdiv(queries, blocks["BLOCK_T"]), batch * heads)](
            query, key, value, router, query_at, key_at, out, routed, lse,
            query.stride(), key.stride(), value.stride(), router.stride(), scale, *sizes, **blocks,
        )  # fmt: skip
        ctx.save_for_backward(query, key, value, query_at, key_at, router, out, routed, lse)
        ctx.scale = scale
        return out, routed.mean(1)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, query_at, key_at, router, out, routed, lse = ctx.saved_tensors
        (batch, heads, queries, _), (groups, keys) = query.shape, key.shape[1:3]
        out_slope, routed_slope = slopes[0], slopes[1] / heads
        delta = (out_slope.float() * out.float()).sum(-1)
        delta = delta + (routed_slope[:, None] * routed).sum(-1)
        query_slope = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        key_slope = torch.empty(key.shape, dtype=key.dtype, device=key.device)
        value_slope = torch.empty(value.shape, dtype=value.dtype, device=value.device)
        router_slope = torch.empty(batch, groups, *router.shape[1:], device=query.device)
        sizes, blocks = _sizes(query, key, value, router)
        given = (query, key, value, router, query_at, key_at, out_slope, routed_slope, lse, delta)
        strides = [t.stride() for t in (query, key, value, router, out_slope, routed_slope)]
        _query_slope_kernel[(triton.cdiv(queries, blocks["BLOCK_T"]), batch * heads)](
            *given, query_slope, *strides, ctx.scale, *sizes, **blocks
        )
        _key_slope_kernel[(triton.cdiv(keys, blocks["BLOCK_N"]), batch * groups)](
            *given, key_slope, value_slope, router_slope, *strides, ctx.scale, *sizes, **blocks
        )
        of_router = router_slope.sum(1).to(router.dtype)
        return query_slope, key_slope, value_slope, None, None, of_router, None


def _sizes(
    query: Tensor, key: Tensor, value: Tensor, router: Tensor
) -> tuple[tuple[int, ...], dict[str, Any]]:
    (_, heads, queries, width), (groups, keys) = query.shape, key.shape[1:3]
    sizes = (heads, heads // groups, queries, keys, width, value.shape[3], router.shape[2])
    most = FULL_PRECISION if query.dtype == torch.float32 else HALF_PRECISION
    blocks = {
        "BLOCK_T": block_size(queries, most["BLOCK_T"]),
        "BLOCK_N": block_size(keys, most["BLOCK_N"]),
        "num_warps": most["num_warps"],
        "BLOCK_D": tile_width(width),
        "BLOCK_E": tile_width(value.shape[3]),
        "BLOCK_R": tile_width(router.shape[2]),
        "DTYPE": tile_dtype(query),
    }
    return sizes, blocks


def lorra_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_positions: Tensor,
    key_positions: Tensor,
    router: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Returns what `op.lorra_attention` describes, without an attention map; gradients included."""
    if 0 in (*query.shape, *key.shape):
        return reference.lorra_attention(
            query, key, value, query_positions, key_positions, router, scale
        )
    query_at, key_at = query_positions.int().contiguous(), key_positions.int().contiguous()
    both: tuple[Tensor, Tensor] = _LorraAttention.apply(
        query, key, value, query_at, key_at, router, scale
    )
    return both
