"""Calibrated attention against its maps."""

import pytest
import torch
from tiny_families import Tiny

from vlm_prune.pruning import DivPrune
from vlm_prune.pruning.attention import ACT, build_attention
from vlm_prune.pruning.attention.act import calibrated
from vlm_prune.vlm.common.errors import InputError


def by_map(query, key, value, scaling, sink, keep):
    """The paper's steps on the whole map of a head."""
    out = torch.empty(*query.shape[:2], value.shape[2])
    length, found = query.shape[1], 0
    for head in range(len(query)):
        mask = torch.ones(length, length).tril().bool()
        scores = query[head] @ key[head].T * scaling
        attention = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        sinks = [
            j for j in range(1, length)
            if float(attention[:, j].sum()) / (length - j) > sink / length
        ]  # fmt: skip
        found += len(sinks)
        others = [j for j in range(length) if j not in sinks]
        for row in attention:
            freed = (1 - keep) * row[sinks].sum()
            row[others] += freed * row[others] / row[others].sum()
            row[sinks] *= keep
        torch.testing.assert_close(attention.sum(1), torch.ones(length))
        out[head] = attention @ value[head]
    assert 0 < found < length
    return out


def test_calibration_equals_that_of_the_maps():
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(3, 40, 8, generator=draw) for _ in range(3))
    key[1, 7] = 0.6 * query[1].mean(0) * 8
    ours = calibrated(query, key, value, 0.5, 3.0, 0.4)
    # where a row pays all but sinks next to nothing, taking their part off leaves few digits
    torch.testing.assert_close(ours, by_map(query, key, value, 0.5, 3.0, 0.4), atol=1e-3, rtol=1e-3)


def test_on_a_model_and_on_a_pruned_prompt():
    case = Tiny("llava")
    rows = [[([0, 1, 2], "Is there a 7?")], [([1], "What color is the star?")]]
    inputs = case.inputs(rows)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        dense = case.model(**inputs).logits[real]
        with ACT(keep=1.0, minimum=1, dense_layers=0)(case.model):
            torch.testing.assert_close(
                case.model(**inputs).logits[real], dense, atol=1e-5, rtol=1e-4
            )
        with ACT(sink=2.0, minimum=1)(case.model) as trace:
            batch = case.model(**inputs).logits
            alone = case.model(**case.inputs(rows[1:])).logits[0]
        assert trace.dense == {"first layers": 4} and (batch[real] - dense).abs().max() > 1e-3
        torch.testing.assert_close(batch[1, real[1]], alone, atol=2e-5, rtol=1e-4)
        with DivPrune(budget=8)(case.model), ACT(sink=2.0, minimum=1)(case.model):
            assert case.model(**inputs).logits.isfinite().all()
    for wrong, says in (
        ({"density": 0.5}, "leave out the density"),
        ({"keep": 2.0}, "keep 2.0 is no share"),
    ):
        with pytest.raises(InputError, match=says):
            build_attention("act", **wrong)
