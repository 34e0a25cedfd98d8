"""Received attention against whole maps in float64."""

import pytest
import torch

from vlm_prune.kernels.attention_received import attention_received
from vlm_prune.kernels.dispatch import backend

SHAPES = [(1, 1, 1, 1, 3, 16), (2, 4, 2, 5, 70, 20), (1, 2, 1, 67, 33, 40)]


def whole_map(query, key, query_positions=None, key_positions=None, window=None):
    """The definition: softmax of the full map, row by row over the visible keys."""
    batch, heads, queries, width = query.shape
    group, out = heads // key.shape[1], torch.zeros(batch, key.shape[2], dtype=torch.float64)
    for b in range(batch):
        rows = 0
        for t in range(queries):
            seen = torch.ones(key.shape[2], dtype=torch.bool)
            if query_positions is not None:
                if query_positions[b, t] < 0:
                    continue
                seen = (key_positions[b] >= 0) & (key_positions[b] <= query_positions[b, t])
            if window is not None:
                seen &= key_positions[b] > query_positions[b, t] - window
            rows += 1
            for h in range(heads):
                logits = key[b, h // group].double() @ query[b, h, t].double() / width**0.5
                out[b, seen] += logits[seen].softmax(0) / heads
        out[b] /= max(rows, 1)
    return out


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["triton", "reference"])
def test_equals_the_whole_map(make, device, assert_near, shape, dtype, name):
    batch, heads, groups, queries, keys, width = shape
    query = make(batch, queries, heads, width, dtype=dtype).transpose(1, 2)
    key = make(batch, groups, keys, width, dtype=dtype)
    with backend(name):
        ours = attention_received(query, key)
    assert_near("received", ours.cpu(), whole_map(query.cpu(), key.cpu()), dtype)


@pytest.mark.parametrize("name", ["triton", "reference"])
def test_positions_hide_the_future_and_padding(make, device, assert_near, name):
    query, key = make(2, 2, 4, 16), make(2, 2, 9, 16)
    query_positions = torch.tensor([[0, 3, 8, -1], [2, 2, -1, -1]], device=device)
    key_positions = torch.tensor([[*range(9)], [-1, -1, -1, 3, 0, 1, 2, 3, 4]], device=device)
    with backend(name):
        ours = attention_received(query, key, query_positions, key_positions)
    exact = whole_map(query.cpu(), key.cpu(), query_positions.cpu(), key_positions.cpu())
    assert_near("received", ours.cpu(), exact)
    assert (ours[1, [0, 1, 2, 3, 7, 8]] == 0).all()


@pytest.mark.parametrize("name", ["triton", "reference"])
@pytest.mark.parametrize("window", [1, 5, 40, 200])
def test_a_window_hides_what_it_has_passed(make, device, assert_near, name, window):
    query, key = make(2, 4, 67, 16), make(2, 2, 90, 16)
    query_positions = torch.stack([torch.arange(23, 90), torch.arange(23, 90)]).to(device)
    query_positions[1, :9] = -1
    key_positions = torch.arange(90, device=device).repeat(2, 1)
    key_positions[1, :30] = -1
    with backend(name):
        ours = attention_received(query, key, query_positions, key_positions, window=window)
    given = (query, key, query_positions, key_positions)
    assert_near("received", ours.cpu(), whole_map(*(x.cpu() for x in given), window=window))
    assert not ours[0, : max(0, 24 - window)].any()


def test_a_window_needs_positions(make):
    with pytest.raises(ValueError, match="window"):
        attention_received(make(1, 1, 2, 8), make(1, 1, 2, 8), window=3)


@pytest.mark.parametrize("name", ["triton", "reference"])
def test_no_queries_give_zeros(make, name):
    with backend(name):
        assert not attention_received(make(1, 2, 0, 16), make(1, 2, 5, 16)).any()


def test_positions_come_in_pairs(make):
    with pytest.raises(ValueError, match="together"):
        attention_received(make(1, 1, 2, 8), make(1, 1, 2, 8), torch.zeros(1, 2))
