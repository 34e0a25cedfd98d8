"""Executors against a loop over queries, and what they read."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vlm_prune.pruning.attention import executors
from vlm_prune.pruning.attention.blocks import (
    Geometry,
    KeptBlocks,
    body_length,
    local_products,
    top_blocks,
)
from vlm_prune.pruning.attention.engine import forced_products
from vlm_prune.pruning.attention.executors import (
    EXECUTORS,
    attend_dense,
    attend_gather,
    attend_reference,
    attend_tail,
    flash_with_sums,
    flex_mask,
    token_mask,
)

SQUARE = Geometry(8, 8, 8, 8)
FINE = Geometry(4, 2, 8, 8)
SINGLE = Geometry(16, 1, 16, 8)
LENGTH = 40


def heads(h=6, g=2, length=LENGTH, d=8, v=8):
    draw = torch.Generator().manual_seed(1)
    sizes = (h, d), (g, d), (g, v)
    return [torch.randn(count, length, width, generator=draw) for count, width in sizes]


def random_blocks(geometry, masks, share=0.4, length=LENGTH):
    draw = torch.Generator().manual_seed(masks)
    keep = torch.rand(masks, *geometry.shape(length), generator=draw) < share
    return KeptBlocks(keep, geometry).forced(length)


def seen(kept, mask, row, length):
    """Keys of one row, by the words of `KeptBlocks`."""
    geometry = kept.geometry
    start = row // geometry.local * geometry.local
    blocks = kept.keep[mask, row // geometry.rows].tolist()
    far = [j for j in range(start) if blocks[j // geometry.columns]]
    return far + list(range(start, row + 1))


def by_loop(query, key, value, kept, scaling):
    out = torch.empty(*query.shape[:2], value.shape[2])
    for head in range(len(query)):
        group, mask = head * len(key) // len(query), head * len(kept.keep) // len(query)
        for row in range(query.shape[1]):
            keys = seen(kept, mask, row, query.shape[1])
            weights = (key[group, keys] @ query[head, row] * scaling).softmax(0)
            out[head, row] = weights @ value[group, keys]
    return out


@pytest.mark.parametrize("masks", [1, 2, 6])
@pytest.mark.parametrize("geometry", [SQUARE, FINE, SINGLE])
@pytest.mark.parametrize("name", ["reference", "gather"])
def test_executors_equal_a_loop(name, geometry, masks):
    query, key, value = heads()
    kept = random_blocks(geometry, masks)
    ours = EXECUTORS[name](query, key, value, kept, 0.3)
    torch.testing.assert_close(ours, by_loop(query, key, value, kept, 0.3), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("geometry", [SQUARE, FINE, SINGLE])
def test_gather_reads_no_key_that_is_skipped(geometry):
    query, key, value = heads()
    kept = random_blocks(geometry, 2)
    right = attend_gather(query, key, value, kept, 0.3)
    mask, most = token_mask(kept, LENGTH), 0
    for row in range(geometry.local, LENGTH, geometry.rows):
        block = slice(row, row + geometry.rows)
        poisoned = [tensor.clone() for tensor in (key, value)]
        for group in range(2):
            skipped = ~mask[group, block].any(0)
            start = row // geometry.local * geometry.local
            skipped[start : start + geometry.local] = False
            most = max(most, int(skipped[:start].sum()))
            for tensor in poisoned:
                tensor[group, skipped] = torch.nan
        ours = attend_gather(query, *poisoned, kept, 0.3)[:, block]
        torch.testing.assert_close(ours, right[:, block])
    assert most >= 8


def test_values_of_another_width_and_half_precision():
    query, key, value = heads(v=5)
    kept = random_blocks(SQUARE, 2)
    right = attend_reference(query, key, value, kept, 0.3)
    torch.testing.assert_close(attend_gather(query, key, value, kept, 0.3), right)
    half = [tensor.bfloat16() for tensor in heads()]
    ours = attend_gather(*half, kept, 0.3)
    assert ours.dtype == torch.bfloat16
    right = attend_reference(*heads(), kept, 0.3)
    torch.testing.assert_close(ours.float(), right, atol=0.03, rtol=0.03)


def test_without_flash_attention_products_are_computed(monkeypatch):
    kept = random_blocks(SQUARE, 2)
    right = attend_gather(*heads(), kept, 0.3)
    assert flash_with_sums("cpu") is not None
    monkeypatch.setattr(executors, "flash_with_sums", lambda device: None)
    torch.testing.assert_close(attend_gather(*heads(), kept, 0.3), right)


def test_gather_computes_no_other_products(monkeypatch):
    """By torch's counter, with plain products in place of the fused ones."""
    monkeypatch.setattr(executors, "flash_with_sums", lambda device: None)
    for geometry in (SQUARE, FINE, SINGLE):
        kept, (query, key, value) = random_blocks(geometry, 2), heads()
        with FlopCounterMode(display=False) as counter:
            attend_gather(query, key, value, kept, 0.3)
        own = local_products(LENGTH, geometry.local)
        # the halves of local regions behind each query are masked
        regions = [min(geometry.local, LENGTH - at) for at in range(0, LENGTH, geometry.local)]
        masked = sum(size * (size - 1) // 2 for size in regions)
        assert own + masked == sum(size**2 for size in regions)
        products = float(kept.products(LENGTH)) + masked
        assert counter.get_total_flops() == 2 * 2 * 6 * 8 * products


def test_tail_rows_see_all_keys():
    query, key, value = heads(length=43)
    right = attend_dense(query, key, value, 0.3)
    for rows in (1, 3, 43):
        ours = attend_tail(query[:, -rows:], key, value, 0.3)
        torch.testing.assert_close(ours, right[:, -rows:], atol=1e-5, rtol=1e-5)


def test_products_are_those_of_the_mask():
    for geometry in (SQUARE, FINE, SINGLE):
        kept = random_blocks(geometry, 2)
        assert kept.products(LENGTH) == token_mask(kept, LENGTH).sum() / 2
    # blocks of 8: five own ones of 36 products, the first one for 32 rows, three rows of a tail
    assert forced_products(43, 40, 8) == 5 * 36 + 32 * 8 + 41 + 42 + 43
    assert [body_length(tokens, 3, 8) for tokens in (43, 42, 3, 1)] == [40, 32, 0, 0]


@pytest.mark.parametrize("geometry", [FINE, SINGLE])
def test_the_coarse_mask_covers_the_fine_one_and_no_more_blocks(geometry):
    kept = random_blocks(geometry, 2, 0.05)
    fine = token_mask(kept, LENGTH)
    coarse = token_mask(kept.coarse(LENGTH), LENGTH)
    blocks = fine.unflatten(1, (5, 8)).unflatten(3, (5, 8)).any(4).any(2)
    causal = torch.ones(LENGTH, LENGTH).tril().bool()
    spread = blocks.repeat_interleave(8, 1).repeat_interleave(8, 2) & causal
    assert torch.equal(coarse, spread)


@pytest.mark.parametrize("density", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("geometry", [SQUARE, FINE, SINGLE])
def test_a_budget_is_met(geometry, density):
    length, tokens = 400, 404
    draw = torch.Generator().manual_seed(0)
    scores = torch.rand(2, *geometry.shape(length), generator=draw)
    keep = top_blocks(scores, geometry, geometry.open_blocks(density, tokens, length))
    kept = KeptBlocks(keep, geometry).forced(length)
    tail = tokens * (tokens + 1) // 2 - length * (length + 1) // 2
    found = (kept.products(length) + tail) / (tokens * (tokens + 1) / 2)
    assert float(found) == pytest.approx(density, abs=0.01)
    # of each row those with the highest scores
    open_to = geometry.candidates(length)
    open_to[:, : geometry.sink] = False
    for mask, own in zip(keep, scores, strict=True):
        for row in range(len(mask)):
            chosen, others = own[row][mask[row]], own[row][open_to[row] & ~mask[row]]
            assert not len(chosen) or not len(others) or chosen.min() >= others.max()


def test_flex_blocks_are_the_kept_ones():
    geometry = Geometry(16, 16, 16, 16)
    kept = random_blocks(geometry, 2, length=80)
    mask = flex_mask(kept, 6, 80)
    expected = kept.keep | torch.eye(5, dtype=torch.bool)
    assert torch.equal(mask.to_dense()[0].bool(), expected.repeat_interleave(3, 0))
    # partial blocks are each block's own alone
    assert torch.equal(mask.kv_indices[0, :, :, 0], torch.arange(5).expand(6, 5).int())
    assert (mask.kv_num_blocks == 1).all()
    from torch.nn.attention.flex_attention import flex_attention

    query, key, value = heads(length=80, d=16, v=16)
    ours = flex_attention(
        query[None], key[None], value[None], block_mask=mask, scale=0.3, enable_gqa=True
    )[0]
    torch.testing.assert_close(ours, attend_reference(query, key, value, kept, 0.3))


@pytest.mark.slow
def test_compiled_flex_equals_the_reference_and_skips():
    geometry = Geometry(32, 32, 32, 32)
    query, key, value = heads(4, 2, 128, 16, 16)
    kept = random_blocks(geometry, 2, length=128)
    kept.keep[:, 3, 2] = False
    right = attend_reference(query, key, value, kept, 0.3)
    with torch.no_grad():
        ours = executors.attend_flex(query, key, value, kept, 0.3)
        torch.testing.assert_close(ours, right, atol=1e-5, rtol=1e-5)
        key[:, 64:96] = math.nan
        value[:, 64:96] = math.nan
        poisoned = executors.attend_flex(query, key, value, kept, 0.3)
    torch.testing.assert_close(poisoned[:, 96:], right[:, 96:], atol=1e-5, rtol=1e-5)
