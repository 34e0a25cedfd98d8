"""Choosing and merging on plain tensors, against values by hand and slow loops."""

import torch

from vlm_prune.pruning.select import (
    averaged,
    density_gap,
    dpp,
    min_max,
    others,
    sums_by_nearest,
)


def test_scores_are_scaled_row_by_row():
    scaled = min_max(torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 5.0], [-4.0, -2.0, 0.0]]))
    expected = torch.tensor([[0.0, 1.0, 0.5], [1.0, 1.0, 1.0], [0.0, 0.5, 1.0]])
    torch.testing.assert_close(scaled, expected)


def test_the_others_are_what_is_not_given_in_order():
    given = torch.tensor([[4, 0], [1, 2]])
    assert others(given, 5).tolist() == [[1, 2, 3], [0, 3, 4]]
    assert others(given[:, :0], 2).tolist() == [[0, 1], [0, 1]]


def test_dpp_takes_the_token_that_makes_the_determinant_largest():
    factors = torch.randn(1, 12, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    kernel = factors @ factors.transpose(1, 2)
    chosen: list[int] = []
    for _ in range(5):
        rest = [i for i in range(12) if i not in chosen]
        minor = {i: kernel[0][[*chosen, i]][:, [*chosen, i]].det().item() for i in rest}
        chosen.append(max(rest, key=lambda i: minor[i]))
    assert dpp(kernel, 5)[0].tolist() == chosen
    assert dpp(kernel[:, :1, :1], 1).tolist() == [[0]]


def test_kept_tokens_are_averaged_with_those_that_join_them():
    kept = torch.tensor([[[2.0, 4.0], [1.0, 1.0], [0.0, 8.0]]])
    dropped = torch.tensor([[[4.0, 2.0], [3.0, 3.0], [8.0, 8.0]]])
    nearest = torch.tensor([[0, 2, 0]])
    sums, sizes = sums_by_nearest(dropped, nearest, 3)
    assert sums.tolist() == [[[12.0, 10.0], [0.0, 0.0], [3.0, 3.0]]]
    assert sizes.tolist() == [[[2.0], [0.0], [1.0]]]
    merged = averaged(kept.half(), dropped.half(), nearest)
    assert merged.dtype == torch.float16
    expected = torch.tensor([[[14 / 3, 14 / 3], [1.0, 1.0], [1.5, 5.5]]])
    torch.testing.assert_close(merged, expected.half())


def test_a_gap_is_the_distance_to_the_nearest_denser_token():
    distance = torch.tensor([[0.0, 1.0, 4.0], [1.0, 0.0, 2.0], [4.0, 2.0, 0.0]])
    density = torch.tensor([3.0, 2.0, 1.0])
    assert density_gap(distance, density).tolist() == [4.0, 1.0, 2.0]
    assert density_gap(distance, density, torch.tensor(9.0)).tolist() == [9.0, 1.0, 2.0]
    # equally dense tokens have no denser one but that above both
    assert density_gap(distance, torch.tensor([1.0, 1.0, 2.0])).tolist() == [4.0, 2.0, 4.0]
