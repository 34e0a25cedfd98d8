"""FastV's score against the attention maps of the model itself."""

import pytest
import torch

from vlm_prune.pruning.fastv import FastV
from vlm_prune.vlm.errors import InputError


def test_it_keeps_what_the_models_own_map_ranks_highest(llava, asked):
    """16 of 32 layers are 3 of 6: the third layer's map decides, its heads' mean by a loop."""
    inputs, last_row_of_layer = asked
    with FastV(budget=400, layer=16)(llava) as trace, torch.no_grad():
        llava(**inputs)
    heads = last_row_of_layer[2].tolist()
    scores = [sum(head[token] for head in heads) / len(heads) for token in range(576)]
    best = sorted(range(576), key=lambda token: -scores[token])[: len(trace.kept[0])]
    assert len(best) == (400 - 576 / 2) * 2  # three layers see all, three what makes the mean 400
    assert trace.kept[0].tolist() == sorted(best)


def test_a_layer_outside_the_stack_is_refused():
    with pytest.raises(InputError, match="give 0 to 31"):
        FastV(layer=32)
