"""Contracts that every registered method keeps; see CONTRIBUTING.md."""

from copy import deepcopy

import pytest
import torch
from tiny_families import failing, restored, snapshot
from transformers import TextStreamer

from vlm_prune.kernels.dispatch import backend
from vlm_prune.pruning import ICR, METHODS, Best, DecoderPruner
from vlm_prune.vlm.families import family_of

LONG = "What color is the star and is there a 7?"
RAGGED = [(1, "Is there a 7?"), (1, LONG), (0, "What is red?"), (2, LONG)]


def build(case, budget=48, **more):
    name, arguments = case
    return METHODS[name](budget=budget, **arguments, **more)


@torch.inference_mode()
def greedy(model, inputs, steps=6, **more):
    return model.generate(
        **inputs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False,
        return_dict_in_generate=True, output_logits=True, **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def unpruned(llava, images, make_inputs):
    return greedy(llava, make_inputs(RAGGED, images))


@pytest.mark.parametrize("positions", ["contiguous", "original"])
def test_keeping_all_equals_the_unpruned_model(
    case, positions, llava, images, make_inputs, unpruned
):
    with build(case, budget=576, positions=positions)(llava):
        out = greedy(llava, make_inputs(RAGGED, images))
    assert torch.equal(out.sequences, unpruned.sequences)
    for ours, theirs in zip(out.logits, unpruned.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("positions", ["contiguous", "original"])
def test_each_row_equals_its_solo_run(case, positions, llava, images, make_inputs):
    method = build(case, positions=positions)
    with method(llava):
        batch = greedy(llava, make_inputs(RAGGED, images))
        used = 0
        for row, (count, question) in enumerate(RAGGED):
            pictures = [images[(used + i) % 3] for i in range(count)] or images
            used += count
            solo = greedy(llava, make_inputs([(count, question)], pictures))
            for step, logits in enumerate(batch.logits):
                torch.testing.assert_close(logits[row], solo.logits[step][0], atol=2e-5, rtol=1e-4)


def test_right_padded_rows_equal_left_padded_ones(case, llava, images, make_inputs):
    with build(case)(llava), torch.no_grad():
        left, right = (
            llava(**make_inputs(RAGGED, images, side)).logits for side in ("left", "right")
        )
    for row, (count, question) in enumerate(RAGGED):
        ids = make_inputs([(count, question)], images)
        with build(case)(llava) as trace, torch.no_grad():
            llava(**ids)
        length = ids["input_ids"].shape[1] - count * (
            576 - int(trace.layer_tokens[-1] if count else 0)
        )
        torch.testing.assert_close(left[row, -length:], right[row, :length], atol=2e-5, rtol=1e-4)


def test_cached_decoding_equals_a_full_forward(case, llava, images, make_inputs, monkeypatch):
    """The reference walks the layers itself: one pass over prompt and answer, no cache, no hooks."""
    inputs = make_inputs([(1, LONG)], images)
    method, reduced, sizes = build(case), [], []
    if isinstance(method, Best):
        method = method.resolved(family_of(llava))
    pruner = method
    if isinstance(method, ICR):  # one image stays
        method = method.wrapped()
    for part in {type(getattr(method, name, method)) for name in ("pre", "inside")}:

        def recorded(*given, reduce=part.reduce):
            kept = reduce(*given)
            reduced.append((kept.indices[0], kept.features[0]))
            sizes.extend(kept.sizes or [])
            return kept

        monkeypatch.setattr(part, "reduce", recorded)
    with pruner(llava) as trace:
        out = greedy(llava, inputs)
    if method.stage == "input":
        pytest.skip("its features come from another image; the pre-LLM road is the same as pool's")
    family, ids = family_of(llava), out.sequences
    start = int((ids[0] == family.image_token).nonzero()[0])
    with torch.no_grad():
        embeds = llava.get_input_embeddings()(ids)[0]
        embeds[start : start + 576] = family.encode(inputs["pixel_values"]).projected[0]
        cuts = method.cuts(576, 6) if method.stage == "decoder" else []
        steps = {cut.layer: places[0] for cut, places in zip(cuts, trace.cuts, strict=True)}
        here, hidden_states, position = torch.arange(len(embeds)), embeds, torch.arange(len(embeds))
        before, inside = (getattr(method, part, method) for part in ("pre", "inside"))

        def drop(places, part):
            """Keep these image tokens, with the features and positions that `part` gave them."""
            nonlocal hidden_states, here, position
            image = (here >= start) & (here < start + 576)
            if len(places) == image.sum():
                return
            kept = ~image | torch.isin(here, start + places)
            hidden_states, here, position = hidden_states[kept], here[kept], position[kept]
            hidden_states[torch.isin(here, start + places)] = reduced.pop(0)[1]
            if part.positions_on(family) != "original":
                position = torch.arange(len(here))

        if not isinstance(method, DecoderPruner):
            drop(reduced[0][0], before)
        for number, layer in enumerate(family.decoder.layers):
            if number in steps:
                drop(steps[number], inside)
            mask = torch.full((len(here), len(here)), float("-inf")).triu(1)[None, None]
            rotary = family.decoder.rotary_emb(hidden_states[None], position_ids=position[None])
            if sizes:
                counted = torch.ones(len(here))
                own = sizes[0].float() if number else sizes[0].float().mean()
                counted[(here >= start) & (here < start + 576)] = own
                shown = int((here < inputs["input_ids"].shape[1]).sum())
                mask = mask + restored(counted, rotary, shown)
            hidden_states = layer(
                hidden_states[None], attention_mask=mask, position_embeddings=rotary
            )[0]
        logits = llava.lm_head(family.decoder.norm(hidden_states))
    for step, ours in enumerate(out.logits):
        theirs = logits[len(logits) - len(out.logits) - 1 + step]
        torch.testing.assert_close(ours[0], theirs, atol=2e-5, rtol=1e-4)


def test_eager_equals_sdpa(case, llava, images, make_inputs):
    inputs, runs = make_inputs(RAGGED, images), []
    # `best` stands for 72 greedy steps on what the tower says, in which its rounding would choose
    # between tokens that are all but alike on random weights: there the tower keeps its attention
    parts = ("text_config",) if case[0] == "best" else ("text_config", "vision_config")
    try:
        for attention in ("sdpa", "eager"):
            llava.set_attn_implementation(dict.fromkeys(parts, attention))
            with build(case, budget=48)(llava) as trace:
                runs.append((greedy(llava, inputs).logits[-1], trace.kept))
    finally:
        llava.set_attn_implementation("sdpa")
    (sdpa, one), (eager, other) = runs
    assert all(map(torch.equal, one, other))
    torch.testing.assert_close(eager, sdpa, atol=2e-5, rtol=1e-4)


def test_beam_search_and_streaming(case, llava, processor, images, make_inputs, capsys):
    inputs = make_inputs([(1, "Is there a 7?")], images)
    with build(case)(llava):
        alone = llava.generate(**inputs, num_beams=3, max_new_tokens=5, min_new_tokens=5)
        pair = llava.generate(
            **make_inputs([(1, "Is there a 7?"), (0, "What is red?")], images),
            num_beams=3, max_new_tokens=5, min_new_tokens=5,
        )  # fmt: skip
        streamer = TextStreamer(processor.tokenizer, skip_prompt=True)
        streamed = llava.generate(**inputs, max_new_tokens=5, min_new_tokens=5, streamer=streamer)
    assert torch.equal(alone[0, -5:], pair[0, -5:])
    prompt = inputs["input_ids"].shape[1]
    assert torch.equal(streamed[:, :prompt], inputs["input_ids"])
    assert capsys.readouterr().out.strip() == processor.decode(streamed[0, prompt:]).strip()


def test_the_model_is_untouched_afterward(case, llava, images, make_inputs):
    inputs = make_inputs([(1, "Is there a 7?")], images)
    greedy(llava, inputs, output_hidden_states=True)  # transformers installs its own hooks lazily
    before = snapshot(llava)
    with build(case)(llava):
        during = snapshot(llava)
        greedy(llava, inputs)
    assert snapshot(llava) == before != during
    with failing(llava.model.language_model.layers[-1]), build(case)(llava):
        greedy(llava, inputs)
    assert snapshot(llava) == before


def test_the_same_seed_keeps_the_same_tokens(case, llava, images, make_inputs):
    kept = []
    for order in ([0, 1], [1, 0]):
        pictures = [images[i] for i in order]
        with build(case, seed=3)(llava) as trace:
            greedy(llava, make_inputs([(1, LONG), (1, LONG)], pictures), steps=1)
        kept.append([trace.kept[i].tolist() for i in order])
    assert kept[0] == kept[1]


@pytest.mark.parametrize("budget", [64, 0.25, 192])
def test_the_budget_is_met(case, budget, llava, images, make_inputs):
    method = build(case, budget=budget)
    with method(llava) as trace:
        greedy(llava, make_inputs([(1, LONG)], images), steps=1)
    wanted = {"none": 576}.get(case[0], budget if isinstance(budget, int) else 144)
    mean = sum(trace.layer_tokens) / len(trace.layer_tokens)
    assert mean <= wanted
    assert mean > wanted * (0.85 if case[0] == "downsample" else 0.98)
    if len(set(trace.layer_tokens)) == 1:
        assert [len(places) for places in trace.kept] == [int(mean)]
        assert trace.kept[0].tolist() == sorted(trace.kept[0].tolist())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gpu_answers_as_it_does_without_kernels(case, dtype, llava, images, make_inputs):
    """In full precision kernels change no selection, in half precision hardly one."""
    model = deepcopy(llava).to("cuda", dtype)
    inputs = make_inputs(RAGGED, images).to("cuda", dtype)
    kept, answers = {}, {}
    for side in ("reference", "triton"):
        with backend(side), build(case)(model) as trace:
            answers[side] = greedy(model, inputs).sequences
        kept[side] = [set(places.tolist()) for places in trace.kept]
    shared = [len(a & b) / len(a) for a, b in zip(*kept.values(), strict=True)]
    if dtype == torch.float32:
        assert min(shared) == 1
        assert torch.equal(answers["triton"], answers["reference"])
    else:
        assert sum(shared) / len(shared) > 0.9
