"""Compaction is a copy: equal to boolean indexing, for every dtype."""

import pytest
import torch

from vlm_prune.kernels.compact_tokens import compact_tokens
from vlm_prune.kernels.dispatch import backend

KEEPS = {
    "ragged": [[0, 1, 1, 0, 1], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0]],
    "full": [[1, 1, 1, 1, 1]],
    "empty": [[0, 0, 0], [0, 0, 0]],
    "one": [[1]],
}


@pytest.mark.parametrize("keep", KEEPS.values(), ids=KEEPS)
@pytest.mark.parametrize("right_padded", [False, True])
@pytest.mark.parametrize("name", ["triton", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_equals_boolean_indexing(make, device, keep, right_padded, name, dtype):
    keep = torch.tensor(keep, dtype=torch.bool, device=device)
    batch, tokens = keep.shape
    hidden_states = make(batch, 7, tokens, dtype=dtype).transpose(1, 2)
    positions = torch.arange(batch * tokens, device=device).view(batch, tokens)
    cosine = make(1, tokens, 3).expand(batch, -1, -1)
    mask = positions % 2 == 0
    with backend(name):
        valid, moved = compact_tokens(
            keep, hidden_states, positions, cosine, mask, right_padded=right_padded
        )
    counts = keep.sum(1).tolist()
    assert valid.shape == (batch, max(counts)) and valid.sum(1).tolist() == counts
    for ours, tensor in zip(moved, (hidden_states, positions, cosine, mask), strict=True):
        assert ours.dtype == tensor.dtype and ours.shape[:2] == valid.shape
        for row, count in enumerate(counts):
            filled = slice(0, count) if right_padded else slice(max(counts) - count, None)
            assert valid[row, filled].all()
            assert torch.equal(ours[row, filled], tensor[row, keep[row]])
            assert not ours[row, ~valid[row]].any()


@pytest.mark.parametrize("name", ["triton", "reference"])
def test_rows_wider_than_a_tile(make, device, name):
    hidden_states, keep = make(1, 3, 1030), torch.tensor([[True, False, True]], device=device)
    with backend(name):
        _, (moved,) = compact_tokens(keep, hidden_states)
    assert torch.equal(moved, hidden_states[:, [0, 2]])
