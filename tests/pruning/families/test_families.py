"""What every method keeps on every family; see CONTRIBUTING.md."""

from inspect import signature

import pytest
import torch
from tiny_families import (
    failing,
    leaves_images,
    refused_on_images,
    restored,
    rounding,
    same_choices,
    snapshot,
)
from transformers import TextStreamer

from vlm_prune.benchmarks.cli.support import support
from vlm_prune.pruning import METHODS, DecoderPruner
from vlm_prune.pruning.best import Best
from vlm_prune.pruning.icr import ICR
from vlm_prune.pruning.registry import build
from vlm_prune.vlm.attention import mask_kind
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.families import family_of

QUESTION, LONG = "Is there a 7?", "What color is the star and is there a 7?"
ALONE = [[([0], QUESTION)]]
RAGGED = [
    [([0], QUESTION)],
    [([], "What is red?")],
    [([1, 2], LONG)],
    [([], QUESTION), ([], "yes"), ([2], LONG)],
]
EVERY = [*METHODS, "divprune+adaptinfer", "fastv+merge", "divprune+random@16"]
STAGES = ["visionzip", "pool", "sparsevlm", "divprune+adaptinfer", "merge", "dart"]
BUDGET = 6


def on(name, tiny, budget=BUDGET, **more):
    """The method, or the test ends here: it must then be refused in one line.

    The README's matrix says of a registered method which of the two it is.
    """
    method = build(name, budget=budget, **more)
    family = family_of(tiny.model)
    lacking = method.needs_on(len(family.decoder.layers)) & family.lacks
    # what `best` stands for on some models may lack more than on this one
    if name in METHODS and name != "best":
        assert support()[name][tiny.name] == (not lacking)
    if lacking:
        with pytest.raises(InputError, match="give one of none, random, .*divprune") as refusal:
            method.admit(tiny.model)
        assert "\n" not in str(refusal.value)
        pytest.skip(f"needs {', '.join(lacking)}")
    if refused_on_images(method, tiny.model):
        with pytest.raises(InputError, match="give video_frames"):
            method(tiny.model)
        pytest.skip("compares frames, which are images")
    return method


@torch.inference_mode()
def greedy(tiny, inputs, steps=3, **more):
    return tiny.model.generate(
        **inputs, max_new_tokens=steps, min_new_tokens=steps, return_dict_in_generate=True,
        output_logits=True, **more,
    )  # fmt: skip


def assert_close(ours, theirs, atol=2e-5):
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=1e-4)


def named(methods):
    """The methods that run by default, and all others behind `slow`."""
    marks = [pytest.param(name, marks=pytest.mark.slow) for name in EVERY if name not in methods]
    return pytest.mark.parametrize("name", [*methods, *marks])


@pytest.fixture(scope="session")
def unpruned(tiny):
    return greedy(tiny, tiny.inputs(RAGGED))


@named([name for name in EVERY if "@" not in name])
def test_keeping_all_equals_the_unpruned_model(name, tiny, unpruned):
    method = on(name, tiny, budget=1.0)
    with method(tiny.model) as trace:
        out = greedy(tiny, tiny.inputs(RAGGED))
    assert torch.equal(out.sequences, unpruned.sequences)
    for ours, theirs in zip(out.logits, unpruned.logits, strict=True):
        assert_close(ours, theirs, rounding(tiny) / 2)
    assert [len(places) for places in trace.kept] == trace.available


@named([name for name in EVERY if "@" not in name])
def test_the_budget_is_met_and_the_model_is_untouched_afterward(name, tiny):
    method = on(name, tiny)
    inputs = tiny.inputs(ALONE)
    greedy(tiny, inputs, output_hidden_states=True)  # transformers installs its own hooks lazily,
    tiny.encode(inputs)  # and those of the tower apart
    before = snapshot(tiny.model)
    with method(tiny.model) as trace:
        during = snapshot(tiny.model)
        greedy(tiny, inputs)
    assert snapshot(tiny.model) == before != during
    mean = sum(trace.layer_tokens) / len(trace.layer_tokens)
    whole = name == "none" or leaves_images(method, tiny.model)
    enough = trace.available[0] if whole else BUDGET
    assert enough * (0.7 if name == "downsample" else 0.9) < mean <= enough
    with failing(family_of(tiny.model).decoder.layers[-1]), method(tiny.model):
        greedy(tiny, inputs)
    assert snapshot(tiny.model) == before


@named([*STAGES, "restore"])
def test_each_row_equals_its_solo_run(name, tiny):
    method = on(name, tiny)
    with method(tiny.model):
        batch = greedy(tiny, tiny.inputs(RAGGED))
        for row, turns in enumerate(RAGGED):
            solo = greedy(tiny, tiny.inputs([turns]))
            for step, logits in enumerate(batch.logits):
                assert_close(logits[row], solo.logits[step][0], rounding(tiny))


@named(STAGES)
def test_right_padded_rows_equal_left_padded_ones(name, tiny):
    method = on(name, tiny)
    with method(tiny.model), torch.inference_mode():
        left, right = (tiny.model(**tiny.inputs(RAGGED, side)).logits for side in ("left", "right"))
        for row, turns in enumerate(RAGGED):
            solo = tiny.model(**tiny.inputs([turns])).logits[0]
            assert_close(left[row, -len(solo) :], solo, rounding(tiny))
            assert_close(right[row, : len(solo)], solo, rounding(tiny))


@named([*STAGES, "restore"])
def test_cached_decoding_equals_a_full_forward(name, tiny, monkeypatch):
    """The reference walks the layers itself: one pass over prompt and answer, no cache, no hooks."""
    method, reduced, sizes = on(name, tiny), {"pre": [], "inside": []}, []
    if isinstance(method, Best):
        method = method.resolved(family_of(tiny.model))
    if method.stage == "input":
        pytest.skip("its features come from another image; the pre-LLM road is the same as pool's")
    reducing = method.wrapped() if isinstance(method, ICR) else method
    for where, features in reduced.items():
        part = type(getattr(reducing, where, reducing))
        if issubclass(part, DecoderPruner) == (where == "inside"):

            def recorded(*given, reduce=part.reduce, to=features):
                kept = reduce(*given)
                to.extend(kept.features)
                sizes.extend(kept.sizes or [])
                return kept

            monkeypatch.setattr(part, "reduce", recorded)
    inputs = tiny.inputs([[([1, 2], LONG)]])  # pictures of different sizes
    with method(tiny.model) as trace:
        out = greedy(tiny, inputs)
    logits = full_forward(tiny, inputs, out.sequences, method, trace, reduced, sizes)
    for step, ours in enumerate(out.logits):
        theirs = logits[len(logits) - len(out.logits) - 1 + step]
        assert_close(ours[0], theirs, rounding(tiny))


def visible(family, kind, here, images):
    """What tokens see in a layer of that kind, `here` (n,) their columns in the full prompt: a mask
    to be added, (1, 1, n, n)."""
    order = torch.arange(len(here))
    seen = order[:, None] >= order
    if kind in family.both_ways:
        for image in images:
            own = torch.isin(here, image)
            seen |= own[:, None] & own
    if kind == "sliding_attention":
        seen &= order[:, None] - order < family.decoder.config.sliding_window
    return torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))[None, None]


@torch.no_grad()
def full_forward(tiny, inputs, sequences, method, trace, reduced, sizes):
    """Logits of one row where `trace` drops tokens, with the features that the method gave."""
    model, family = tiny.model, family_of(tiny.model)
    prompt, ids = inputs["input_ids"], sequences[0]
    encoded = tiny.encode(inputs)
    is_image = torch.zeros_like(ids, dtype=torch.bool)
    is_image[: prompt.shape[1]] = prompt[0] == family.image_token
    images = list(is_image.nonzero()[:, 0].split(encoded.counts))
    hidden_states = model.get_input_embeddings()(ids).clone()
    hidden_states[is_image] = torch.cat(encoded.projected)
    both_ways = family.blocks(inputs, prompt.shape[1]) is not None
    width, shared = getattr(family.decoder.config, "hidden_size_per_layer_input", 0), {}
    if width:  # embeddings of each layer, in which an image has those of padding
        padding = family.decoder.config.pad_token_id
        words = family.decoder.get_per_layer_inputs(ids.masked_fill(is_image, padding)[None])[0]
    deep = [torch.zeros_like(hidden_states) for _ in encoded.deepstack]
    for whole, layer in zip(deep, encoded.deepstack, strict=True):
        whole[is_image] = torch.cat(layer)
    places = family.positions(prompt, torch.ones_like(prompt), encoded.inputs)
    more = torch.arange(1, 1 + len(ids) - prompt.shape[1])
    places = torch.cat([places, places[..., -1:] + more], -1)
    here, left = torch.arange(len(ids)), [torch.arange(len(image)) for image in images]
    position = torch.arange(len(ids))
    counted = torch.ones(2, len(ids))  # in the first layer and in others
    for image, at, own in zip(images, trace.entered, sizes, strict=bool(sizes)):
        counted[0, image[at]], counted[1, image[at]] = own.float().mean(), own.float()

    def drop(kept, features, part, always=False):
        nonlocal hidden_states, here, left, position
        gone, new = torch.zeros_like(ids, dtype=torch.bool), {}
        for image, before, after in zip(images, left, kept, strict=True):
            given = features.pop(0) if always or len(after) < len(before) else None
            if len(after) < len(before):
                gone[image] = True
                gone[image[after]] = False
                new |= dict(zip(image[after].tolist(), given, strict=True))
            if family.row_breaks:  # text behind a row, which is empty now and was not
                rows = image.tensor_split((image.diff() > 1).nonzero()[:, 0] + 1)
                for row in rows[:-1]:
                    was, stays = (torch.isin(row, image[own]).any() for own in (before, after))
                    gone[row[-1] + 1] |= was and not stays
        keep = ~gone[here]
        hidden_states, here, position, left = (
            hidden_states[keep].clone(),
            here[keep],
            position[keep],
            kept,
        )
        if part.positions_on(family) != "original":
            position = torch.arange(len(here))
        for row, column in enumerate(here.tolist()):
            hidden_states[row] = new.get(column, hidden_states[row])

    if trace.entered:
        drop(trace.entered, reduced["pre"], getattr(method, "pre", method), always=True)
    cuts = set()
    if method.stage == "decoder":
        layers = len(family.decoder.layers)
        allowed = getattr(method, "inside", method).depths_on(family)
        cuts = {
            cut.layer for count in encoded.counts for cut in method.cuts(count, layers, allowed)
        }
    if width:  # and projections of what the decoder is given
        each = torch.zeros(len(ids), *words.shape[1:])
        each[here] = family.decoder.project_per_layer_inputs(
            hidden_states[None], words[here][None]
        )[0]
    kept = iter(trace.cuts)
    for number, layer in enumerate(family.decoder.layers):
        if number in cuts:
            drop(next(kept), reduced["inside"], getattr(method, "inside", method))
        at = places[1:, :, here] if family.mrope else position[None]
        kind, own = mask_kind(family.decoder.config, number), {}
        linear = kind == "linear_attention"
        mask = None if linear else visible(family, kind, here, images if both_ways else [])
        if "layer_type" in signature(family.decoder.rotary_emb.forward).parameters:
            own = {"layer_type": kind}
        rotary = family.decoder.rotary_emb(hidden_states[None], position_ids=at, **own)
        if (counted != 1).any():
            shown = int((here < prompt.shape[1]).sum())
            mask = mask + restored(counted[int(number > 0), here], rotary, shown)
        more = {}
        if width:
            more = {"per_layer_input": each[here, number][None], "shared_kv_states": shared}
        hidden_states = layer(
            hidden_states[None], attention_mask=mask, position_embeddings=rotary, **more
        )[0]
        if number < len(deep):
            hidden_states = hidden_states + deep[number][here]
    assert next(kept, None) is None and not any(reduced.values())
    return model.lm_head(family.decoder.norm(hidden_states))


@named(STAGES)
def test_eager_equals_sdpa(name, tiny):
    method, inputs, runs = on(name, tiny), tiny.inputs(RAGGED), []
    try:
        for attention in ("sdpa", "eager"):
            tiny.model.set_attn_implementation(attention)
            with method(tiny.model) as trace:
                logits = greedy(tiny, inputs).logits[-1]
            runs.append((logits, trace.kept))
    finally:
        tiny.model.set_attn_implementation("sdpa")
    (sdpa, one), (eager, other) = runs
    counts = [sum(len(at) for at, _ in row) for row in RAGGED]
    # on some CPUs dart takes another pivot, and with it other tokens
    same = same_choices(one, other, counts, len(one[0]) if name == "dart" else 0)
    assert sum(same) > 1  # one row has no image
    assert_close(eager[same], sdpa[same])


@named(STAGES)
def test_beam_search_and_streaming(name, tiny, capsys):
    method = on(name, tiny)
    steps = {"max_new_tokens": 4, "min_new_tokens": 4}
    inputs, pair = tiny.inputs(ALONE), tiny.inputs([RAGGED[2], ALONE[0]])
    with method(tiny.model), torch.inference_mode():
        alone = tiny.model.generate(**inputs, num_beams=3, **steps)
        two = tiny.model.generate(**tiny.inputs([RAGGED[2]]), num_beams=3, **steps)
        both = tiny.model.generate(**pair, num_beams=3, **steps)
        streamer = TextStreamer(tiny.processor.tokenizer, skip_prompt=True)
        streamed = tiny.model.generate(**inputs, streamer=streamer, **steps)
    assert torch.equal(two[0, -4:], both[0, -4:])
    assert torch.equal(alone[0, -4:], both[1, -4:])
    prompt = inputs["input_ids"].shape[1]
    assert torch.equal(streamed[:, :prompt], inputs["input_ids"])
    printed = capsys.readouterr().out.strip()
    assert printed == tiny.processor.tokenizer.decode(streamed[0, prompt:]).strip()
