"""FoPru's score against the tower's own attention maps, and its row strategy."""

import pytest
import torch

from vlm_prune.pruning.fopru import FoPru, row_scores
from vlm_prune.pruning.received import in_tower
from vlm_prune.vlm.families import family_of
from vlm_prune.vlm.tokens import top


@pytest.mark.parametrize("queries", ["all", "patches", "cls"])
def test_received_attention_equals_the_towers_maps(queries, llava, images, make_inputs):
    inputs = make_inputs([(2, "Is there a 7?")], images)
    llava.set_attn_implementation("eager")
    try:
        maps = llava.model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions
    finally:
        llava.set_attn_implementation("sdpa")
    rows = {"all": slice(None), "patches": slice(1, None), "cls": slice(0, 1)}[queries]
    expected = maps[-2].mean(1)[:, rows, 1:].mean(1)
    ours = in_tower(family_of(llava).encode(inputs["pixel_values"]).groups[0].tokens, queries)
    torch.testing.assert_close(ours, expected)


def test_row_strategy_takes_whole_rows_and_trims_the_last():
    grid = torch.tensor([[1.0, 1, 1], [5, 0, 9], [2, 3, 2]])
    kept = top(row_scores(grid.flatten()[None], ((3, 3),)), 5)
    assert kept.tolist() == [[3, 4, 5, 6, 7]]


@pytest.mark.parametrize("budget", [1, 3, 4, 7, 9, 14])
def test_row_strategy_over_grids_of_several_widths_equals_a_loop(budget):
    """Rows are compared by their means, whatever their width; each gives its best tokens first."""
    torch.manual_seed(budget)
    grids = ((2, 2), (2, 5))
    scores = torch.rand(3, 14)
    scores[:, :4] += 0.5  # a sum would put the wide rows in front, a mean the narrow ones
    kept = top(row_scores(scores, grids), budget)
    for image in range(3):
        rows, start = [], 0
        for height, width in grids:
            for _ in range(height):
                rows.append(range(start, start + width))
                start += width
        value = scores[image].tolist()
        rows.sort(key=lambda row: -sum(value[i] for i in row) / len(row))
        expected = [i for row in rows for i in sorted(row, key=lambda i: -value[i])][:budget]
        assert kept[image].tolist() == sorted(expected)


@pytest.mark.parametrize("strategy", ["rank", "row"])
def test_reduce_equals_a_loop_over_the_towers_maps(strategy, llava, images, make_inputs):
    """s_j is the mean of A_ij over heads and queries i of the layer that gives the features."""
    inputs = make_inputs([(1, "Is there a 7?")], images)
    llava.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            tower = llava.model.vision_tower(inputs["pixel_values"], output_attentions=True)
    finally:
        llava.set_attn_implementation("sdpa")
    score = [0.0] * 576
    for head in tower.attentions[-2][0]:
        for row in head.double().tolist():
            score = [total + weight for total, weight in zip(score, row[1:], strict=True)]
    ranked = sorted(range(576), key=lambda j: -score[j])
    if strategy == "row":
        rows = [range(24 * r, 24 * r + 24) for r in range(24)]
        rows.sort(key=lambda row: -sum(score[j] for j in row))
        ranked = [j for row in rows for j in sorted(row, key=lambda j: -score[j])]
    with FoPru(budget=100, strategy=strategy)(llava) as trace, torch.no_grad():
        llava(**inputs)
    assert trace.kept[0].tolist() == sorted(ranked[:100])
