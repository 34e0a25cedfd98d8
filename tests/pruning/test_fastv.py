"""FastV's score against the attention maps of the model itself."""

import pytest
import torch

from vlm_prune.pruning.fastv import FastV
from vlm_prune.vlm.common.errors import InputError


@pytest.mark.parametrize("queries", ["all", "last"])
def test_it_keeps_what_the_models_own_map_ranks_highest(llava, question_maps, queries):
    """16 of 32 layers are 3 of 6: the third layer's map decides, its mean by a loop."""
    inputs, maps = question_maps
    with FastV(budget=400, layer=16, queries=queries)(llava) as trace, torch.no_grad():
        llava(**inputs)
    scores = [0.0] * 576
    for head in maps[2].tolist():
        for row in head if queries == "all" else head[-1:]:
            scores = [score + weight for score, weight in zip(scores, row, strict=True)]
    best = sorted(range(576), key=lambda token: -scores[token])[: len(trace.kept[0])]
    assert len(best) == (400 - 576 / 2) * 2  # three layers see all, three what makes the mean 400
    assert trace.kept[0].tolist() == sorted(best)


def test_queries_that_there_are_not_are_refused():
    with pytest.raises(InputError, match="queries"):
        FastV(queries="first")


def test_a_layer_outside_the_stack_is_refused():
    with pytest.raises(InputError, match="give 0 to 31"):
        FastV(layer=32)
