"""Calibrated attention against its maps."""

import pytest
import torch
from tiny_families import Tiny

from vlm_prune.pruning import DivPrune
from vlm_prune.pruning.attention import ACT, build_attention, calibrate_act
from vlm_prune.pruning.attention.act import CalibratedRun, calibrated
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.sparse_attention import replaced_attention


def by_map(query, key, value, scaling, sink, keep, heads=range(3)):
    """The paper's steps on the whole map of a head, for some heads."""
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
        if head not in heads:
            sinks = []
        others = [j for j in range(length) if j not in sinks]
        for row in attention:
            freed = (1 - keep) * row[sinks].sum()
            row[others] += freed * row[others] / row[others].sum()
            row[sinks] *= keep
        torch.testing.assert_close(attention.sum(1), torch.ones(length))
        out[head] = attention @ value[head]
    assert 0 < found < len(query) * length
    return out


def test_calibration_equals_that_of_the_maps():
    # a draw without rows that pay all but sinks next to nothing: taking their part off leaves few digits
    draw = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(3, 40, 8, generator=draw) for _ in range(3))
    key[1, 7] = 0.6 * query[1].mean(0) * 8
    ours = calibrated(query, key, value, 0.5, 3.0, 0.4)
    right = by_map(query, key, value, 0.5, 3.0, 0.4)
    torch.testing.assert_close(ours, right, atol=1e-4, rtol=1e-4)
    without = by_map(query, key, value, 0.5, 3.0, 0.4, heads=[0])
    assert torch.equal(without[0], right[0]) and not torch.allclose(without[1], right[1])


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


class MapRun(CalibratedRun):
    """Calibration of some heads by their maps, one prompt at a time."""

    def attend(self, call, prompt, row):
        shared = len(prompt.query) // len(prompt.key)
        key, value = (part.repeat_interleave(shared, 0) for part in (prompt.key, prompt.value))
        heads = self.heads[call.layer].nonzero()[:, 0].tolist()
        return [by_map(prompt.query, key, value, call.scaling, self.method.sink, 0.4, heads)]


@torch.no_grad()
def test_heads_that_help_alone_are_found_and_used(tmp_path):
    case, method = Tiny("llava"), ACT(sink=1.5, minimum=1, dense_layers=1)
    inputs = case.inputs([[([0, 1, 2], "Is there a 7?")], [([1], "What color is the star?")]])
    labels, calls = torch.tensor([5, 40]), []

    def accuracy():
        """Finer than a share of right answers, so that heads differ."""
        calls.append(1)
        logits = case.model(**inputs).logits[:, -1].log_softmax(-1)
        return float(logits[torch.arange(2), labels].mean().exp())

    passes = []
    found = calibrate_act(case.model, accuracy, method, lambda *done: passes.append(done))
    assert passes == [(done, 7) for done in range(1, 8)] and len(calls) == 7
    before, right = accuracy(), {}
    for layer in (1, 2, 3):
        right[layer] = torch.zeros(2, dtype=torch.bool)
        for head in range(2):
            alone = {layer: torch.arange(2) == head}
            with replaced_attention(case.model, MapRun(method, heads=alone)):
                right[layer][head] = accuracy() > before
    ours = found.of_layers("heads")
    assert ours.keys() == right.keys()
    assert all(torch.equal(ours[layer], right[layer]) for layer in right)
    assert 0 < sum(int(heads.sum()) for heads in right.values()) < 6
    assert found.about["accuracy"] == pytest.approx(before)
    # those heads together, and none of a layer without any
    path = tmp_path / "act.safetensors"
    found.save(path)
    with replaced_attention(case.model, MapRun(method, heads=right)):
        expected = accuracy()
    chosen = ACT(sink=1.5, minimum=1, dense_layers=1, calibration=str(path))
    with chosen(case.model):
        assert accuracy() == pytest.approx(expected, rel=1e-3)
    nothing = {name: torch.zeros_like(t) for name, t in found.tensors.items()}
    type(found).of("act", nothing, case.model).save(path)
    with ACT(sink=1.5, minimum=1, dense_layers=1, calibration=str(path))(case.model) as trace:
        assert accuracy() == before
    assert trace.dense == {"first layers": 1, "no heads to calibrate": 3}
    with pytest.raises(InputError, match="no prompt has the 2048 tokens"):
        calibrate_act(case.model, accuracy)
