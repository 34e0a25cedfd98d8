"""PyramidDrop's score: the attention of the layer after the cut."""

import pytest
import torch

from vlm_prune.pruning.pyramiddrop import PyramidDrop
from vlm_prune.vlm.common.errors import InputError


def test_the_first_cut_keeps_what_the_next_layers_map_ranks_highest(llava, question_maps):
    """Every layer before the cut sees all tokens, so the unpruned map of layer 3 is its score."""
    inputs, maps = question_maps
    with PyramidDrop(budget=400)(llava) as trace, torch.no_grad():
        llava(**inputs)
    first = trace.cuts[0][0]
    assert trace.layer_tokens[:3] == [576, 576, len(first)]  # after 8 of 32 layers, so 2 of 6
    last = maps[2][:, -1]
    scores = [sum(float(head[token]) for head in last) / len(last) for token in range(576)]
    best = sorted(range(576), key=lambda token: -scores[token])[: len(first)]
    assert first.tolist() == sorted(best)


def test_each_cut_keeps_a_ratio_of_the_one_before():
    counts = [cut.keep for cut in PyramidDrop(budget=200, ratio=0.25).cuts(576, 32)]
    assert counts[1] == pytest.approx(counts[0] / 4, abs=1)
    assert counts[2] == pytest.approx(counts[1] / 4, abs=1)


@pytest.mark.parametrize("ratio", [0, 1.5])
def test_a_ratio_that_is_no_share_is_refused(ratio):
    with pytest.raises(InputError, match="ratio"):
        PyramidDrop(ratio=ratio)
