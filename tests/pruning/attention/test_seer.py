"""What gates read and learn, and gates that were trained."""

import pytest
import torch
from attention_cases import SHORT
from tiny_families import Tiny

from vlm_prune.pruning.attention import Seer, build_attention, train_gates
from vlm_prune.pruning.attention.inputs import AttentionInputs
from vlm_prune.pruning.attention.seer import (
    GateExample,
    GateInputs,
    divergence,
    pooled_attention,
    starting_maps,
    turned_by_positions,
)
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.families import family_of
from vlm_prune.vlm.sparse_attention import replaced_attention

ROWS = [[([0, 1, 2], "Is there a 7?")], [([1, 2, 3, 0, 1], "What color is the star?")]]
OPTIONS = {name: value for name, value in SHORT.items() if name != "block"} | {"block": 8}


@pytest.fixture(scope="module")
def llava():
    return Tiny("llava")


def test_targets_are_the_largest_attention_between_blocks():
    draw = torch.Generator().manual_seed(2)
    query, key = (torch.randn(heads, 40, 16, generator=draw) for heads in (4, 2))
    ours = pooled_attention(AttentionInputs(query, key, 0.4, 0, 40), 8)
    causal = torch.ones(40, 40).tril().bool()
    for group in range(2):
        best = torch.zeros(5, 5)
        for head in (2 * group, 2 * group + 1):
            scores = (query[head] @ key[group].T * 0.4).masked_fill(~causal, -torch.inf)
            attention = scores.softmax(-1)
            for i in range(5):
                for j in range(i + 1):
                    tile = attention[8 * i : 8 * i + 8, 8 * j : 8 * j + 8]
                    best[i, j] = max(best[i, j], tile.max())
        torch.testing.assert_close(ours[group], best / best.sum(1, keepdim=True))
    # the divergence by its definition, without the first of five query blocks
    example = GateExample.of(AttentionInputs(query, key, 0.4, 0, 40), 8)
    maps = starting_maps(example)
    logits = example.query @ example.key[..., -16:].transpose(1, 2) / 4
    terms = []
    for group in range(2):
        for i in range(1, 5):
            chosen = logits[group, i, : i + 1].softmax(0)
            target = ours[group, i, : i + 1]
            terms.append(float((target * (target / chosen).log()).sum()))
    found = divergence(*maps, GateExample(example.query, example.key, None, ours))
    assert float(found) == pytest.approx(sum(terms) / len(terms), rel=1e-4)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_5"])
def test_queries_and_keys_are_read_as_before_their_rotation(family):
    if family != "llava":
        pytest.importorskip("torchvision")
    case, seen, run = Tiny(family), {}, GateInputs(Seer(**OPTIONS))
    layers = family_of(case.model).decoder.layers
    number = max(n for n, layer in enumerate(layers) if hasattr(layer, "self_attn"))
    attention, attend = layers[number].self_attn, run.attend

    def note(module, args, output):
        norm = getattr(attention, "k_norm", None)
        states = output.unflatten(-1, (-1, attention.head_dim))
        seen["key"] = (states if norm is None else norm(states))[0].transpose(0, 1)

    def keep(call, prompt, row):
        if call.layer == number:
            seen["back"] = turned_by_positions(prompt.key, prompt.rotary, back=True)
            seen["again"] = turned_by_positions(seen["back"], prompt.rotary), prompt.key
        return attend(call, prompt, row)

    run.attend = keep
    handle = attention.k_proj.register_forward_hook(note)
    with torch.no_grad(), replaced_attention(case.model, run):
        case.model(**case.inputs([[([0, 1], "Is there a 7?")]]))
    handle.remove()
    torch.testing.assert_close(seen["back"], seen["key"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(*seen["again"], atol=1e-5, rtol=1e-4)
    assert len(run.examples[number]) == 1


def test_trained_gates_come_nearer_to_attention(llava, tmp_path):
    path, inputs = tmp_path / "gates.safetensors", llava.inputs(ROWS)
    steps = []
    before = {name: p.detach().clone() for name, p in llava.model.named_parameters()}
    found = train_gates(
        llava.model, [inputs], Seer(**OPTIONS), steps=60, learning_rate=1e-2,
        progress=lambda: steps.append(1),
    )  # fmt: skip
    assert all(torch.equal(p, before[name]) for name, p in llava.model.named_parameters())
    assert not any(p.grad is not None for p in llava.model.parameters())
    start, end = found.about["divergence"]
    assert end < 0.8 * start and len(steps) == 60 and found.about["prompts"] == 2
    found.save(path)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        dense = llava.model(**inputs).logits[real]
        method = Seer(density=0.6, calibration=str(path), **OPTIONS)
        with method(llava.model) as trace:
            some = llava.model(**inputs).logits[real]
        with Seer(density=1.0, calibration=str(path), **OPTIONS)(llava.model):
            torch.testing.assert_close(
                llava.model(**inputs).logits[real], dense, atol=1e-5, rtol=1e-4
            )
    assert trace.density == pytest.approx(0.6, abs=0.06) and not torch.allclose(some, dense)
    # untrained gates are mean pooling of what was turned back
    example = GateExample(torch.randn(2, 5, 16), torch.randn(2, 5, 48), None)
    query, key = starting_maps(example)
    assert torch.equal(example.query @ query, example.query)
    assert torch.equal(example.key @ key, example.key[..., 32:])
    for wrong, says in (
        ({"calibration": str(path), "block": 16}, "gates for blocks of 8 tokens; give block=8"),
        ({}, "make them with vlm-prune calibrate seer"),
    ):
        with pytest.raises(InputError, match=says):
            build_attention("seer", **wrong).admit(llava.model)
    with pytest.raises(InputError, match="no prompt has the 2048 tokens"):
        train_gates(llava.model, [inputs])
