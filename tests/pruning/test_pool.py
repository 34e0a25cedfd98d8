"""Pooling against a loop over the rectangles."""

from dataclasses import replace

import pytest
import torch

from vlm_prune.pruning.pool import Pool, rectangles
from vlm_prune.vlm.tokens import VisionTokens


@pytest.mark.parametrize("grid", [(5, 5), (3, 7), (7, 3), (1, 9)])
def test_rectangles_cover_the_grid_once(grid):
    rows, columns = grid
    for k in range(1, rows * columns + 1):
        cells = [
            (row, column)
            for down, across in rectangles(k, rows, columns)
            for row in range(rows)[down]
            for column in range(columns)[across]
        ]
        assert len(rectangles(k, rows, columns)) == k
        assert sorted(cells) == [(r, c) for r in range(rows) for c in range(columns)]


@pytest.mark.parametrize("budget", [1, 2, 6, 11, 20])
def test_averages_stand_at_the_middle_tokens_of_their_rectangles(budget):
    """Over an overview and wider tiles, which share the budget by their numbers of tokens."""
    torch.manual_seed(budget)
    grids, features = ((2, 2), (4, 4)), torch.randn(2, 20, 3)
    tokens = VisionTokens(
        features=features, projected=features, grids=grids, seeds=(0, 1), projector=None,
        query_key=None,
    )  # fmt: skip
    kept = Pool(budget=budget).reduce(tokens)
    expected = {}
    for start, (rows, columns) in zip((0, 4), grids, strict=True):
        end = start + rows * columns
        share = budget * end // 20 - budget * start // 20
        for down, across in rectangles(share, rows, columns) if share else []:
            own_rows, own_columns = range(rows)[down], range(columns)[across]
            members = [start + r * columns + c for r in own_rows for c in own_columns]
            # of an even number of rows or columns it is the first of the two in the middle
            row = own_rows[(len(own_rows) - 1) // 2]
            column = own_columns[(len(own_columns) - 1) // 2]
            expected[start + row * columns + column] = members
    assert len(expected) == budget
    for image in range(2):
        assert kept.indices[image].tolist() == sorted(expected)
        means = [features[image, expected[index]].mean(0) for index in sorted(expected)]
        torch.testing.assert_close(kept.features[image], torch.stack(means))


@pytest.mark.parametrize(("budget", "groups"), [(1, 1), (3, 3), (10, 5), (60, 10), (120, 10)])
def test_a_videos_boxes_are_averages_over_space_and_time(budget, groups, clips):
    """A map of which token counts in which average: each once, and alike where boxes are."""
    each = torch.eye(120).expand(2, -1, -1)
    kept = Pool(budget=budget).reduce_video(replace(clips, projected=each))
    weights = kept.features[0]
    assert weights.shape == (budget, 120)
    member = weights > 0
    assert (member.sum(0) == 1).all()
    torch.testing.assert_close(weights, member / member.sum(1, keepdim=True))
    frames = {tuple(own.view(10, 12).any(1).tolist()) for own in member}
    assert len(frames) == groups
    assert member[torch.arange(budget), kept.indices[0]].all()
