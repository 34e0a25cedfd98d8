"""Compiled prefill gives what the model gives without it, and compiles each form of its layers once."""

import copy
import functools
from contextlib import nullcontext

import pytest
import tiny_families
import torch
from tiny_families import Tiny, failing, snapshot
from torch._dynamo.utils import counters

from vlm_prune.pruning.registry import build
from vlm_prune.vlm import PrunedVLM, compiled
from vlm_prune.vlm.cache import CACHE, cache_of
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.compiled import compiled_prefill, padded_length, padded_mask

ALONE = [[([0], "Is there a 7?")]]
ROWS = [*ALONE, [([], "What is red?")], [([1, 2], "What color is the star?")]]


@pytest.fixture(autouse=True)
def fresh():
    """Nothing is compiled yet, nor is anything left behind."""
    torch._dynamo.reset()
    counters.clear()
    compiled.compiled_run_layer.cache_clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def traced(monkeypatch):
    """Dynamo alone: it traces and guards as always, and what it traced runs as it is."""

    @functools.cache
    def run_layer(pads):
        return torch.compile(
            compiled.run_layer, fullgraph=True, dynamic=not pads, backend="eager",
            recompile_limit=compiled.MOST_FORMS,
        )  # fmt: skip

    monkeypatch.setattr(compiled, "compiled_run_layer", run_layer)


@functools.cache
def small(kind):
    """A model of two layers: tracing takes its time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_families, "LAYERS", 2)
        return Tiny(kind)


def answers(tiny, inputs, name=None, budget=4, compiles=None, tokens=3):
    """The answer, its logits and the kept tokens, with a method and padded or not, or without either."""
    model = tiny.model
    if hasattr(model.model, "rope_deltas"):
        model.model.rope_deltas = None
    pruner = nullcontext() if name is None else build(name, budget=budget)(model)
    compiling = nullcontext() if compiles is None else compiled_prefill(model, pads=compiles)
    with torch.inference_mode(), compiling, pruner as trace:
        out = model.generate(
            **inputs, max_new_tokens=tokens, min_new_tokens=tokens, return_dict_in_generate=True,
            output_logits=True,
        )  # fmt: skip
    kept = [] if trace is None else [each.tolist() for each in trace.kept]
    return out.sequences, torch.stack(out.logits), kept


def same(one, other, atol=2e-5):
    assert torch.equal(one[0], other[0]) and one[2] == other[2]
    torch.testing.assert_close(one[1], other[1], atol=atol, rtol=1e-4)


def test_padding_is_little():
    assert [padded_length(n) for n in (1, 32, 33, 96, 97)] == [32, 32, 64, 96, 128]
    assert [padded_length(n) for n in (512, 513, 1024, 1025)] == [512, 576, 1024, 1152]
    assert all(n <= padded_length(n) <= max(n + 31, n * 9 / 8) for n in range(1, 5000))


def test_padded_masks_hide_padding():
    mask = torch.tensor([[True, False], [True, True]])[None, None]
    hidden = torch.finfo(torch.float32).min
    seen = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert padded_mask(mask, 2)[0, 0].tolist() == [[bool(n) for n in row] for row in seen]
    added = padded_mask(torch.where(mask, 0.0, hidden), 2)[0, 0]
    assert added.tolist() == [[0.0 if n else hidden for n in row] for row in seen]


@pytest.mark.parametrize("pads", [True, False])
def test_prompts_of_many_lengths_compile_once_each(traced, pads):
    """50 prompts of 20 lengths."""
    tiny = small("llava")
    texts = ["Is there" + " a" * count + " 7?" for count in range(1, 41, 2)]
    prompts = [tiny.inputs([[([number % 4], texts[number % 20])]]) for number in range(50)]
    kept = 4 - 25
    lengths = {inputs["input_ids"].shape[1] + kept for inputs in prompts}
    assert len(lengths) == 20
    forms = {padded_length(length) for length in lengths} if pads else {None}
    for number, inputs in enumerate(prompts):
        # all forms are compiled after the first 20
        with torch._dynamo.config.patch(error_on_recompile=number >= 20):
            found = answers(tiny, inputs, "divprune", compiles=pads, tokens=2)
        same(found, answers(tiny, inputs, "divprune", tokens=2))
    assert counters["stats"]["unique_graphs"] == len(forms)
    assert not counters["graph_break"]
    assert not pads or len(forms) == 2


OTHERS = [(None, True), (None, False), ("fastv", False), ("divprune+adaptinfer", True)]


@pytest.mark.parametrize(
    ("name", "pads"),
    [
        ("divprune", True), ("divprune", False), ("fastv", True),
        *(pytest.param(*other, marks=pytest.mark.slow) for other in OTHERS),
    ],
)  # fmt: skip
def test_rows_of_a_batch(traced, name, pads):
    tiny = small("llava")
    whole = answers(tiny, tiny.inputs(ROWS), name, compiles=pads)
    same(whole, answers(tiny, tiny.inputs(ROWS), name))
    for number, row in enumerate(ROWS):
        _, logits, _ = answers(tiny, tiny.inputs([row]), name, compiles=pads)
        torch.testing.assert_close(whole[1][:, number], logits[:, 0], atol=2e-5, rtol=1e-4)


KINDS = [
    "llava_next", "llava_next_video", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe",
    "internvl", "smolvlm", "idefics3", "gemma3", "mistral3", "glm4v", "glm46v",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_families(traced, kind):
    tiny = small(kind)
    for rows in (ALONE, ROWS):
        inputs = tiny.inputs(rows)
        for name in (None, "divprune", "fastv"):
            same(answers(tiny, inputs, name, compiles=True), answers(tiny, inputs, name))


@pytest.mark.parametrize("kind", ["qwen3_5", "gemma4"])
def test_decoders_of_other_layers_are_refused(kind):
    with pytest.raises(InputError, match="not compiled; leave out compile"):
        compiled_prefill(small(kind).model).__enter__()


def test_the_model_stays_as_it_was(traced):
    tiny = small("llava")
    inputs, model = tiny.inputs(ALONE), tiny.model
    before, plain = snapshot(model), answers(tiny, inputs)
    answers(tiny, inputs, "divprune", compiles=True)
    assert snapshot(model) == before
    with failing(model.model.language_model.norm), compiled_prefill(model):
        model(**inputs)
    assert snapshot(model) == before
    with compiled_prefill(model):
        same(answers(Copied(copy.deepcopy(model)), inputs), plain)
    assert counters["stats"]["unique_graphs"] == 1
    same(answers(tiny, inputs), plain)


class Copied:
    """What `answers` reads of a model of the tests."""

    def __init__(self, model):
        self.model = model


def test_prefixes_and_gradients_run_as_before(traced):
    tiny = small("llava")
    model, inputs = tiny.model, tiny.inputs(ALONE)
    with torch.inference_mode():
        whole = model(**inputs).logits
        held = model(**tiny.inputs([[([], "What is red?")]]))
    with compiled_prefill(model, pads=True):
        torch.testing.assert_close(model(**inputs).logits, whole, atol=2e-5, rtol=1e-4)
        assert not counters["stats"]["unique_graphs"]
        with torch.no_grad():
            length = cache_of(dict(held)).get_seq_length()
            model(input_ids=torch.tensor([[60, 61, 62]]), **{CACHE: cache_of(dict(held))})
            assert cache_of(dict(held)).get_seq_length() == length + 3
        assert not counters["stats"]["unique_graphs"]


class DependsOnValues(torch.nn.Module):
    """Breaks a graph."""

    def forward(self, states):
        return states if states.sum().item() else -states


def test_what_cannot_be_compiled_is_refused_in_one_line(traced, monkeypatch):
    tiny = small("llava")
    model, layers = tiny.model, tiny.model.model.language_model.layers
    inputs = tiny.inputs(ALONE)
    with torch.inference_mode(), compiled_prefill(model, pads=True):
        hook = layers[0].mlp.register_forward_hook(lambda *_: None)
        with pytest.raises(InputError, match="hooks inside decoder layers"):
            model(**inputs)
        hook.remove()
        plain, layers[0].mlp.act_fn = layers[0].mlp.act_fn, DependsOnValues()
        with pytest.raises(InputError, match="llava model cannot be compiled") as refusal:
            model(**inputs)
        layers[0].mlp.act_fn = plain
        assert "\n" not in str(refusal.value)
    monkeypatch.setattr(model.config.get_text_config(), "_attn_implementation", "flex_attention")
    with pytest.raises(InputError, match="not flex_attention"):
        compiled_prefill(model).__enter__()
    monkeypatch.undo()
    with compiled_prefill(model), pytest.raises(InputError, match="replaced"):
        compiled_prefill(model).__enter__()


def test_pruned_vlm_compiles(traced):
    tiny = small("llava")
    picture, pruner = tiny.pictures[0], build("divprune", budget=4)
    found, plain = (
        PrunedVLM(tiny.model, tiny.processor, pruner, compile=compile).answer(
            picture, "Is there a 7?", max_new_tokens=4
        )
        for compile in (True, False)
    )
    assert found == plain
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("pads", [True, False])
def test_inductor(pads):
    """What is compiled in earnest, with the padding of a GPU and without."""
    tiny = small("llava")
    for rows in (ALONE, ROWS):
        for name in (None, "divprune"):
            inputs = tiny.inputs(rows)
            found = answers(tiny, inputs, name, compiles=pads)
            same(found, answers(tiny, inputs, name), atol=1e-4)
    assert not counters["graph_break"]
