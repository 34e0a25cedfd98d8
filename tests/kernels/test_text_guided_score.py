"""The text-guided score against the paper's sums over a full causal map, in float64."""

import pytest
import torch

from vlm_prune.kernels.dispatch import backend
from vlm_prune.kernels.text_guided_score import text_guided_score

# batch, heads, groups, keys, width, and per row: padding in front, text at the end
CASES = [
    (1, 1, 1, 9, 16, [(0, 1)]),
    (2, 4, 2, 70, 20, [(0, 7), (5, 3)]),
    (3, 2, 1, 80, 8, [(0, 70), (9, 66), (79, 0)]),
]


def full_map(query, key, columns, key_valid, scale, window=None):
    """s = sum_h 1^T (A + A^T - diag A)_text A_text of a whole L x L causal map."""
    batch, heads, _, width = query.shape
    group, length = heads // key.shape[1], key.shape[2]
    out = torch.zeros(batch, length, dtype=torch.float64)
    for b in range(batch):
        text = columns[b][columns[b] >= 0]
        for h in range(heads):
            rows = torch.zeros(length, width, dtype=torch.float64)
            rows[text] = query[b, h, columns[b] >= 0].double()
            scores = rows @ key[b, h // group].double().T * scale
            hidden = torch.ones(length, length, dtype=torch.bool).triu(1) | ~key_valid[b]
            if window is not None:
                hidden |= torch.ones(length, length, dtype=torch.bool).tril(-window)
            attention = scores.masked_fill(hidden, -torch.inf).softmax(-1)[text]
            to_text = attention[:, text]
            symmetric = to_text + to_text.T - to_text.diag().diag()
            out[b] += symmetric.sum(0) @ attention
    return out


def build(make, device, case, dtype=torch.float32):
    batch, heads, groups, keys, width, rows = case
    most = max(text for _, text in rows)
    columns = torch.full((batch, most), -1, device=device)
    key_valid = torch.ones(batch, keys, dtype=torch.bool, device=device)
    for b, (padding, text) in enumerate(rows):
        key_valid[b, :padding] = False
        columns[b, most - text :] = torch.arange(keys - text, keys)
    query = make(batch, most, heads, width, dtype=dtype).transpose(1, 2)
    return query, make(batch, groups, keys, width, dtype=dtype), columns, key_valid, width**-0.5


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["triton", "reference"])
def test_equals_the_papers_sums(make, device, assert_near, case, dtype, name):
    inputs = build(make, device, case, dtype)
    with backend(name):
        ours = text_guided_score(*inputs)
    exact = full_map(*(x.cpu() if isinstance(x, torch.Tensor) else x for x in inputs))
    assert_near("score", ours.cpu(), exact, dtype)


@pytest.mark.parametrize("window", [1, 6, 30])
@pytest.mark.parametrize("case", CASES[1:], ids=str)
@pytest.mark.parametrize("name", ["triton", "reference"])
def test_a_window_hides_what_it_has_passed(make, device, assert_near, case, window, name):
    inputs = build(make, device, case)
    with backend(name):
        ours = text_guided_score(*inputs, window=window)
    exact = full_map(*(x.cpu() if isinstance(x, torch.Tensor) else x for x in inputs), window)
    assert_near("score", ours.cpu(), exact)


@pytest.mark.parametrize("name", ["triton", "reference"])
def test_a_row_alone_equals_its_row_in_a_batch(make, device, assert_near, name):
    query, key, columns, valid, scale = build(make, device, CASES[1])
    with backend(name):
        batch = text_guided_score(query, key, columns, valid, scale)
        alone = text_guided_score(
            query[1:, :, 4:], key[1:, :, 5:], columns[1:, 4:] - 5, valid[1:, 5:], scale
        )
    assert_near("row", batch[1:, 5:], alone.double())
    assert not batch[1, :5].any()


@pytest.mark.parametrize("name", ["triton", "reference"])
def test_no_text_gives_zeros(make, device, name):
    valid = torch.ones(1, 5, dtype=torch.bool, device=device)
    none = torch.empty(1, 0, dtype=torch.long, device=device)
    with backend(name):
        score = text_guided_score(make(1, 2, 0, 16), make(1, 2, 5, 16), none, valid, 0.25)
    assert not score.any()
