"""FoPru's score against the tower's own attention maps, and its row strategy."""

import pytest
import torch

from vlm_prune.pruning.fopru import row_scores
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
