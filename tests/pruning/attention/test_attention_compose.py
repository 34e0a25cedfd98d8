"""Sparse attention as a part of a pruner's name."""

import pytest
import torch
from tiny_families import Tiny

from vlm_prune.pruning import Cascade, DivPrune
from vlm_prune.pruning.attention import Pooled, XAttention
from vlm_prune.pruning.registry import build
from vlm_prune.vlm.common.errors import InputError


def test_a_name_builds_both_parts():
    pruner = build(
        "divprune+xattention", budget=8, **{"attention.density": 0.5, "attention.block": 16}
    )
    assert isinstance(pruner, DivPrune) and pruner.budget == 8 and pruner.stage == "projector"
    assert pruner.attention == XAttention(density=0.5, block=16)
    # servers run other models than this one, and refuse what does more than choose tokens
    assert DivPrune().only_chooses and not pruner.only_chooses
    cascade = build("divprune+fastv+pooled", budget=8)
    assert isinstance(cascade, Cascade) and cascade.attention == Pooled()
    assert build("none+local").attention is not build("none+local").attention
    for wrong, says in (
        ("pooled", "unknown method 'pooled'"),
        ("none+poled", "unknown method 'poled'"),
        ("none+pooled+fastv", "unknown method 'pooled'"),
    ):
        with pytest.raises(InputError, match=says):
            build(wrong)
    with pytest.raises(InputError, match="did you mean 'block'"):
        build("none+pooled", **{"attention.blok": 3})


def test_both_parts_run_and_leave_nothing_behind():
    case = Tiny("llava")
    inputs = case.inputs([[([0, 1, 2], "Is there a 7?")]])
    short = {"attention.block": 8, "attention.minimum": 1, "attention.tail": 4}
    pruner = build("divprune+pooled", budget=16, **short, **{"attention.density": 0.6})
    with torch.no_grad():
        with pruner(case.model) as trace:
            ours = case.model(**inputs).logits
        with DivPrune(budget=16)(case.model), pruner.attention(case.model):
            assert torch.equal(case.model(**inputs).logits, ours)
        assert case.model.config.text_config._attn_implementation == "sdpa"
    assert [len(kept) for kept in trace.kept] == [16] * 3
    densities = trace.attention.of_row(0, 4)
    assert len(densities) == 4 and 0 < max(densities) < 1
    case.model.set_attn_implementation("eager")
    with pytest.raises(InputError, match="--attn sdpa"):
        pruner.admit(case.model)
