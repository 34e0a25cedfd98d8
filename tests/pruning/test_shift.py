"""Change points of attention and what is proposed from them."""

import numpy as np
import pytest
import torch

from vlm_prune.pruning.shift import change_points, histogram, propose, regions
from vlm_prune.vlm.common.errors import InputError


def split_of(curve):
    """The place that leaves the least squared error around two means; a part has two layers."""
    errors = {
        place: sum(part.var() * len(part) for part in (curve[:place], curve[place:]))
        for place in range(2, len(curve) - 1)
    }
    return min(errors, key=errors.get)


def test_change_points_split_the_cumulative_curves_best():
    attention = torch.rand(12, 30, generator=torch.Generator().manual_seed(0)) ** 3
    order = attention.sum(0).argsort(descending=True)[:6]
    expected = [split_of(np.cumsum(attention[:, token].double().numpy())) for token in order]
    assert change_points(attention, share=0.2) == expected
    assert len(set(expected)) > 1


def test_a_late_burst_moves_the_point_back():
    early, late = torch.full((10, 1), 0.01), torch.full((10, 1), 0.01)
    early[2], late[7] = 1, 1
    assert sorted(change_points(torch.cat([early, late], 1), share=1.0)) == [2, 7]


def test_the_histogram_counts_by_layer():
    assert histogram([3, 3, 5], 6) == [0, 0, 0, 2, 0, 1]


@pytest.mark.parametrize(
    ("counts", "dense", "places"),
    [
        ([0, 1, 9, 8, 1, 0, 5, 0], [(2, 3), (6, 6)], [2, 4, 7]),
        ([0, 0, 0, 9, 0, 0], [(3, 3)], [3, 4]),
        ([0, 0, 0, 0, 0, 9], [(5, 5)], [5]),
        ([0, 0, 0, 0], [], []),
        ([9, 0, 0, 0], [(0, 0)], [1]),
        ([0, 3, 2, 1], [(1, 1)], [1, 2]),
    ],
)
def test_cuts_stand_around_dense_regions_and_never_inside(counts, dense, places):
    assert regions(counts) == dense
    assert propose(counts, 3) == places
    for first, last in dense:
        assert not any(first < place <= last for place in places)


def test_fewer_cuts_stand_after_the_densest():
    assert propose([0, 1, 9, 8, 1, 0, 5, 0], 1) == [4]


def test_fewer_than_four_layers_have_no_change_point():
    with pytest.raises(InputError, match="3 layers have no change point"):
        change_points(torch.rand(3, 5))
    assert len(change_points(torch.rand(4, 5), share=1.0)) == 5
