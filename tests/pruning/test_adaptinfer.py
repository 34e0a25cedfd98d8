"""AdaptInfer's schedule, and its score against a loop over the model's own attention map."""

import pytest
import torch

from vlm_prune.pruning.adaptinfer import AdaptInfer
from vlm_prune.pruning.schedule import Schedule
from vlm_prune.vlm.common.errors import InputError


def test_authors_presets_stand_where_the_code_prunes():
    cuts = AdaptInfer(preset="64").cuts(576, 32)
    assert [(cut.layer, cut.keep) for cut in cuts] == [(2, 133), (11, 27), (21, 3)]
    with pytest.raises(InputError, match="unknown preset"):
        AdaptInfer(preset="63")


def test_budgets_scale_the_authors_pattern_for_64_tokens():
    assert AdaptInfer(budget=64).pattern() == [(2, 133), (11, 27), (21, 3)]


def test_a_cut_keeps_what_a_loop_over_the_layers_map_ranks_highest(llava, images, make_inputs):
    """s[v] = sum over heads and text j of p[j] A[j, v]; p[j] is the attention that j receives from
    the text and pays to it, its own counted once.
    """
    inputs = make_inputs([(1, "What color is the star and is there a 7?")], images)
    llava.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            maps = llava(**inputs, output_attentions=True).attentions[2][0].double()
    finally:
        llava.set_attn_implementation("sdpa")
    image = (inputs["input_ids"][0] == llava.config.image_token_id).nonzero()[:, 0].tolist()
    text = range(image[-1] + 1, maps.shape[-1])
    assert len(text) > 5
    score = dict.fromkeys(image, 0.0)
    for head in maps.tolist():
        for j in text:
            prior = sum(head[i][j] + head[j][i] for i in text) - head[j][j]
            for v in image:
                score[v] += prior * head[j][v]
    ranked = sorted(image, key=lambda v: -score[v])
    schedule = Schedule(layers=6, places=(3,), shares=(1,))
    with AdaptInfer(budget=320, schedule=schedule)(llava) as trace, torch.no_grad():
        llava(**inputs)
    keep = (320 - 576 // 2) * 2
    assert [image[0] + index for index in trace.kept[0].tolist()] == sorted(ranked[:keep])
