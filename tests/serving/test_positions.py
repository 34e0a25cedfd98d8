"""Rows bring where they stand; a pruned prompt's unpruned one is made again."""

import pytest
import torch

from vlm_prune.vlm.serving.positions import expanded, split_grid, with_grid


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_coordinates_survive_any_type(dtype):
    grid = (2, 150, 300)
    tokens = grid[0] * grid[1] * grid[2]
    places = torch.randperm(tokens, generator=torch.Generator().manual_seed(0))[:500].sort().values
    rows = torch.randn(500, 8).to(dtype)
    out, coordinates = split_grid(with_grid(rows, places, grid))
    assert torch.equal(out, rows)
    expected = torch.stack(torch.unravel_index(places, grid), 1)
    assert torch.equal(coordinates, expected)


def test_the_unpruned_prompt_is_made_again():
    # two images of 6 and 4 tokens, of which 2 and 4 are kept
    ids = [1, 9, 9, 2, 3, 9, 9, 9, 9, 4]
    whole, kept = expanded(ids, [(1, 2, 6), (5, 4, 4)])
    assert whole == [1, 9, 9, 9, 9, 9, 9, 2, 3, 9, 9, 9, 9, 4]
    assert [token for token, left in zip(whole, kept, strict=True) if left] == ids
    assert kept[1:7] == [True, True, False, False, False, False]
    assert expanded([1, 2], []) == ([1, 2], [True, True])
