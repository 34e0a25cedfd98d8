"""What holds for learners on every supported language model, with every option."""

import copy

import pytest
import torch
from shaken import shake

from vlm_prune.learners import WingsConfig, attach, detach
from vlm_prune.learners import tokens as tokens_module
from vlm_prune.learners.laws import laws
from vlm_prune.learners.model import wings_layers
from vlm_prune.learners.train import checkpoint_activations
from vlm_prune.pruning import METHODS
from vlm_prune.vlm import PrunedVLM
from vlm_prune.vlm.cache import CACHE

ROWS = [(1, 5), (0, 9), (2, 4), (1, 3)]
CLOSE = {"atol": 2e-5, "rtol": 1e-4}
CAUSAL = [
    {},
    {"query": "sequential"},
    {"router": "sum", "scale": 2.0},
    {"router": "none"},
    {"rope": False, "images": "first", "skip_text": 2},
    {"modalities": ("visual",), "layers": (0, 2)},
    {"modalities": ("textual",), "stride": 2},
]
OPTIONS = [*CAUSAL, {"visual_mask": "all"}]


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits


def greedy(model, inputs, steps=5, **more):
    return model.generate(
        **inputs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False,
        return_dict_in_generate=True, output_logits=True, **more,
    )  # fmt: skip


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_untrained_learners_leave_the_model_as_it_is_bit_for_bit(
    options, implementation, llava, prompts
):
    llava.set_attn_implementation(implementation)
    inputs = prompts(ROWS)
    base, answer = logits(llava, inputs), greedy(llava, inputs)
    attach(llava, WingsConfig(rank=4, max_positions=128, **options))
    assert torch.equal(logits(llava, inputs), base)
    ours = greedy(llava, inputs)
    assert all(torch.equal(a, b) for a, b in zip(ours.logits, answer.logits, strict=True))


@pytest.mark.parametrize("wings", [False, True])
@pytest.mark.parametrize("place", ["q_proj", "o_proj", "attention"])
def test_a_forward_that_fails_leaves_nothing_behind(place, wings, winged, prompts, monkeypatch):
    """Out of memory before, inside and after the attention, with learners and in `laws`."""
    model, inputs = winged(), prompts([(1, 5)])
    if not wings:
        detach(model)
    layers = model.model.language_model.layers
    with torch.no_grad():
        expected = model(**inputs).logits
        configs = [layer.self_attn.config for layer in layers]

        def fail(*_, **__):
            raise torch.OutOfMemoryError("out of memory")

        with monkeypatch.context() as patch:
            if place == "attention":
                patch.setattr("torch.nn.functional.scaled_dot_product_attention", fail)
            else:
                patch.setattr(getattr(layers[1].self_attn, place), "forward", fail)
            for call in (lambda: model(**inputs), lambda: laws(model, inputs)):
                with pytest.raises(torch.OutOfMemoryError):
                    call()
        assert all(layer.self_attn.config is c for layer, c in zip(layers, configs, strict=True))
        assert torch.equal(model(**inputs).logits, expected)
        model.generate(**inputs, max_new_tokens=2)
        if wings:
            detach(model)
    plain = model.model.language_model.config
    assert all(layer.self_attn.config is plain for layer in layers)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_learners_have_an_effect_and_detaching_undoes_it(options, llava, winged, prompts):
    def snapshot():
        return {
            name: (len(module._forward_hooks), len(module._forward_pre_hooks), sorted(vars(module)))
            for name, module in llava.named_modules()
        }

    inputs = prompts(ROWS)
    plain, before = logits(llava, inputs), snapshot()
    assert (logits(winged(**options), inputs) - plain).abs().max() > 1e-2
    assert snapshot() != before
    detach(llava)
    assert snapshot() == before
    assert torch.equal(logits(llava, inputs), plain)
    assert llava.model.language_model.layers[0].self_attn.config is llava.config.text_config


def moved_before(model, inputs, place):
    """The largest change of a logit before `place` when the token there changes."""
    changed = copy.deepcopy(inputs)
    changed["input_ids"][:, place] = 6 + (changed["input_ids"][:, place] - 5) % 58
    difference = (logits(model, inputs) - logits(model, changed)).abs().amax((0, 2))
    assert difference[place:].max() > 1e-3
    return float(difference[:place].max())


@pytest.mark.parametrize("options", CAUSAL, ids=str)
def test_no_logit_moves_before_the_token_that_changes(options, winged, prompts):
    model = winged(**options)
    for rows in ([(1, 8)], [(0, 24)], [(2, 6)]):
        inputs = prompts(rows)
        places = (inputs["input_ids"][0] != 5).nonzero()[:, 0].tolist()
        for place in places[2::5] + places[-1:]:
            assert moved_before(model, inputs, place) < 1e-6


def test_that_test_catches_a_mask_indexed_by_key_column(winged, prompts, monkeypatch):
    """Column j of the causal mask is not the position of text key j once an image stands before it."""
    model = winged()

    def by_column(self, modality, chosen):
        keys = honest(self, modality, chosen)
        column = torch.arange(keys.visible.shape[2])
        query = torch.arange(keys.visible.shape[1])[:, None]
        return keys._replace(visible=(column <= query).expand_as(keys.visible), runs=None)

    honest = tokens_module.PromptTokens._gather
    monkeypatch.setattr(tokens_module.PromptTokens, "_gather", by_column)
    inputs = prompts([(1, 8)])
    assert moved_before(model, inputs, inputs["input_ids"].shape[1] - 1) > 1e-3


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_has_the_same_logits_alone_and_in_any_batch(options, side, winged, prompts):
    model, inputs = winged(**options), prompts(ROWS, side=side)
    together, used = logits(model, inputs), 0
    for row, (images, _) in enumerate(ROWS):
        valid = inputs["attention_mask"][row].bool()
        solo = {"input_ids": inputs["input_ids"][row : row + 1, valid]}
        if images:
            solo["pixel_values"] = inputs["pixel_values"][used : used + images]
        used += images
        torch.testing.assert_close(together[row, valid], logits(model, solo)[0], **CLOSE)


def test_text_only_rows_do_not_depend_on_pixels(winged, prompts):
    model, inputs = winged(), prompts(ROWS)
    other = inputs | {"pixel_values": torch.randn_like(inputs["pixel_values"])}
    first, second = logits(model, inputs), logits(model, other)
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], second[0])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_cached_decoding_equals_the_full_forward(options, winged, prompts):
    model, inputs = winged(**options), prompts(ROWS)
    out = greedy(model, inputs)
    new = out.sequences.shape[1] - inputs["input_ids"].shape[1]
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, new), value=1)
    whole = inputs | {"input_ids": out.sequences, "attention_mask": mask}
    expected = logits(model, whole)[:, -new - 1 : -1]
    torch.testing.assert_close(torch.stack(out.logits, 1), expected, **CLOSE)


def test_beam_search_with_a_cache_equals_beam_search_without(winged, prompts):
    model, inputs = winged(), prompts(ROWS)
    options = {"num_beams": 3, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    cached = model.generate(**inputs, **options)
    assert torch.equal(cached, model.generate(**inputs, **options, use_cache=False))


@pytest.mark.parametrize("router", ["mean", "sum"])
def test_the_two_weights_sum_to_one_and_differ_between_tokens(router, winged, prompts):
    model, seen = winged(router=router), []
    for layer in wings_layers(model).values():
        layer.router.register_forward_hook(lambda *call: seen.append(call[-1]))
    logits(model, prompts(ROWS))
    weights = torch.stack(seen)
    assert weights.shape[::3] == (3, 2)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert weights[..., 0].std() > 0.01


def test_the_router_reads_the_main_attention(winged, prompts):
    """Its input is the map that eager attention returns, times its weights."""
    model, inputs, read = winged(), prompts([(1, 6)]), []
    for layer in wings_layers(model).values():
        layer.router.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    logits(model, inputs)
    fused = read.copy()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions
    for layer, weights, ours in zip(wings_layers(model).values(), maps, fused, strict=True):
        expected = weights.mean(1) @ layer.router.weight[: weights.shape[-1]]
        torch.testing.assert_close(ours, expected, **CLOSE)


@pytest.mark.parametrize("name", ["fopru", "zoo-exact", "pool", "adaptinfer"])
@pytest.mark.parametrize("positions", ["contiguous", "original"])
def test_learners_see_the_tokens_that_a_pruner_keeps(name, positions, winged, prompts):
    """Keeping all equals no pruning; keeping some, the dropped ones are out of the learner's sight."""
    model, inputs = winged(), prompts(ROWS)
    plain = greedy(model, inputs)
    with METHODS[name](budget=16, positions=positions)(model):
        kept_all = greedy(model, inputs)
    torch.testing.assert_close(kept_all.logits[-1], plain.logits[-1], **CLOSE)

    seen = []
    for layer in wings_layers(model).values():
        layer.learners["visual"].register_forward_pre_hook(
            lambda _, args: seen.append(int(args[1].visible[0, -1].sum()))
        )
    one = prompts([(1, 6)])
    vlm = PrunedVLM(model, None, METHODS[name](budget=6, positions=positions))
    with vlm.pruner(model) as trace:
        out = greedy(model, one)
    per_layer = [round(tokens) for tokens in trace.layer_tokens]
    assert seen == per_layer * len(out.logits)
    assert min(per_layer) < 16

    whole = one | {"input_ids": out.sequences[:, :-1]}
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    if name != "adaptinfer":
        with vlm.pruner(model):
            full = logits(model, whole)
        torch.testing.assert_close(torch.stack(out.logits, 1), full[:, -5:], **CLOSE)


def test_gradient_checkpointing_gives_the_same_gradients(winged, prompts):
    model, inputs = winged(query="sequential"), prompts(ROWS)

    def gradients():
        model.zero_grad()
        first = model(**prompts([(1, 6)]), labels=prompts([(1, 6)])["input_ids"]).loss
        (first + model(**inputs, labels=inputs["input_ids"]).loss).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    checkpoint_activations(model.train())
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys()
    assert any(".wings.router" in name for name in plain)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)


def test_only_the_output_map_learns_at_the_first_step(llava, prompts):
    attach(llava, WingsConfig(rank=4))
    inputs = prompts(ROWS)
    llava(**inputs, labels=inputs["input_ids"]).loss.backward()
    for layer in wings_layers(llava).values():
        for name, parameter in layer.named_parameters():
            assert bool(parameter.grad.any()) == name.endswith("output.up.weight"), name


@pytest.mark.parametrize("rows", [[(1, 5)], [(1, 5), (1, 5)], [(0, 9)]], ids=str)
def test_decoding_makes_keys_of_new_tokens_alone(rows, winged, prompts):
    model, inputs = winged(), prompts(rows)
    lengths_seen = {"visual": [], "textual": []}
    for name, learner in wings_layers(model)[0].learners.items():
        learner.key.down.register_forward_pre_hook(
            lambda _, args, lengths=lengths_seen[name]: lengths.append(args[0].shape[1])
        )
    ids = inputs["input_ids"]
    with torch.no_grad():
        output = model(**inputs, use_cache=True)
        for step in range(3):
            new = torch.full((len(rows), 1), 7 + step)
            ids = torch.cat([ids, new], 1)
            output = model(input_ids=new, **{CACHE: output[CACHE]})
        lengths = {name: list(lengths_seen[name]) for name in lengths_seen}
        whole = model(**inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    torch.testing.assert_close(output.logits[:, -1], whole.logits[:, -1], atol=2e-4, rtol=1e-4)
    images, text = rows[0]
    assert lengths["textual"] == [(images + 1) * text, 1, 1, 1]
    assert lengths["visual"] == [16 if images else 1]


def test_a_cropped_or_reordered_cache_makes_keys_anew(winged, prompts):
    model, inputs = winged(), prompts([(1, 5), (1, 5)])
    with torch.no_grad():
        cache = model(**inputs, use_cache=True)[CACHE]
        new = torch.tensor([[7], [8]])
        cache.reorder_cache(torch.tensor([1, 0]))
        reordered = model(input_ids=new, **{CACHE: cache}).logits[:, -1]
        ids = torch.cat([inputs["input_ids"].flip(0), new], 1)
        pixels = inputs["pixel_values"].flip(0)
        whole = model(input_ids=ids, pixel_values=pixels).logits[:, -1]
        torch.testing.assert_close(reordered, whole, atol=2e-4, rtol=1e-4)
        cache.crop(-1)
        other = torch.tensor([[9], [10]])
        cropped = model(input_ids=other, **{CACHE: cache}).logits[:, -1]
        ids = torch.cat([inputs["input_ids"].flip(0), other], 1)
        whole = model(input_ids=ids, pixel_values=pixels).logits[:, -1]
    torch.testing.assert_close(cropped, whole, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("options", CAUSAL, ids=str)
@pytest.mark.parametrize("rows", [[(1, 5)], [(2, 4), (2, 4)], [(0, 6)]], ids=str)
def test_runs_of_queries_give_what_the_mask_gives(options, rows, winged, prompts, monkeypatch):
    model, inputs = winged(**options), prompts(rows)
    by_runs, again = logits(model, inputs), greedy(model, inputs).logits
    monkeypatch.setattr(tokens_module.PromptTokens, "_runs", lambda *_: None)
    torch.testing.assert_close(by_runs, logits(model, inputs), **CLOSE)
    torch.testing.assert_close(again, greedy(model, inputs).logits, **CLOSE)


def test_the_router_costs_no_call_once_it_is_trained(llava, prompts, monkeypatch):
    """Its columns are values of the same call on a CPU; before, a second call leaves the first as it was."""
    honest, calls = torch.nn.functional.scaled_dot_product_attention, []

    def count(*arguments, **options):
        calls.append(1)
        return honest(*arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", count)

    def called(router):
        attach(llava, WingsConfig(rank=4, max_positions=128, router=router))
        numbers = []
        for deviation in (0, 0.3):
            if deviation:
                shake(llava, deviation=deviation)
            calls.clear()
            logits(llava, prompts([(1, 5)]))
            numbers.append(len(calls))
        detach(llava)
        return numbers

    plain, routed = called("none"), called("mean")
    assert plain[0] == plain[1] == routed[1] == routed[0] - 3


def test_a_cache_keeps_wide_keys_and_narrow_values(winged, prompts):
    model, inputs = winged(), prompts([(1, 5)])
    with torch.no_grad():
        cache = model(**inputs, use_cache=True)[CACHE]
        model(input_ids=torch.tensor([[7]]), **{CACHE: cache})
    heads, width = 32 // model.model.language_model.layers[0].self_attn.head_dim, 32
    for modality, tokens in (("visual", 16), ("textual", 11)):
        kept = cache.layers[-1].caches[modality]
        assert kept.features.tensor_so_far.shape == (1, heads, tokens, width // heads)
        assert len(kept.by_learner) == 3
        for keys, values in kept.by_learner.values():
            assert keys.tensor_so_far.shape == kept.features.tensor_so_far.shape
            assert values.tensor_so_far.shape == (1, tokens, 4)


def test_a_copied_prefix_cache_answers_as_the_whole_prompt_does(winged, prompts):
    model, inputs = winged(), prompts([(1, 5)])
    with torch.inference_mode():
        prefix = model(**inputs, use_cache=True)[CACHE]
    for number in (7, 8):
        new = torch.tensor([[number]])
        whole = inputs | {"input_ids": torch.cat([inputs["input_ids"], new], 1)}
        whole["attention_mask"] = torch.ones_like(whole["input_ids"])
        cache = copy.deepcopy(prefix)
        with torch.no_grad():
            ours = model(input_ids=new, **{CACHE: cache}).logits
        torch.testing.assert_close(ours[:, -1], logits(model, whole)[:, -1], **CLOSE)
    with torch.no_grad():
        last = model(input_ids=new, **{CACHE: prefix}).logits
    torch.testing.assert_close(last, ours, **CLOSE)
