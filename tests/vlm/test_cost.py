"""The analytic FLOP counts against torch's counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vlm_prune.pruning.registry import build
from vlm_prune.vlm.cache import CACHE
from vlm_prune.vlm.cost import key_value_bytes, linear_attention_weights, prefill_flops
from vlm_prune.vlm.families import family_of


def test_prefill_and_tower_flops(llava, images, make_inputs):
    inputs = make_inputs([(1, "Is there a 7?")], images)
    text = llava.config.text_config
    length = inputs["input_ids"].shape[1]
    llava.set_attn_implementation("eager")
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            llava.model.vision_tower(inputs["pixel_values"])
        assert family_of(llava).tower_flops([576]) == pytest.approx(
            counter.get_total_flops(), rel=0.01
        )
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            hidden_states = torch.zeros(1, length, text.hidden_size)
            last = llava.model.language_model(inputs_embeds=hidden_states).last_hidden_state[:, -1:]
            llava.lm_head(last)
    finally:
        llava.set_attn_implementation("sdpa")
    counted = prefill_flops(text, length - 576, [576.0] * text.num_hidden_layers)
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_products_of_attention_are_counted_by_their_share_of_the_causal_half(llava):
    text, layers = llava.config.text_config, llava.config.text_config.num_hidden_layers
    tokens, width = 40, text.num_attention_heads * text.head_dim
    everything = prefill_flops(text, 8, [32.0] * layers)
    causal = prefill_flops(text, 8, [32.0] * layers, [1.0] * layers)
    sparse = prefill_flops(text, 8, [32.0] * layers, [0.25] + [1.0] * (layers - 1))
    # a product of a query and a key is one of width multiplications, and one of the value's
    assert everything - causal == 2 * 2 * width * layers * (tokens**2 - tokens * (tokens + 1) / 2)
    assert causal - sparse == 2 * 2 * width * 0.75 * tokens * (tokens + 1) / 2


def test_key_value_bytes_are_those_of_the_cache(llava, images, make_inputs):
    inputs = make_inputs([(1, "Is there a 7?")], images)
    with torch.no_grad():
        cache = llava(**inputs, use_cache=True)[CACHE]
    held = sum(
        t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values)
    )
    text = llava.config.text_config
    counted = key_value_bytes(
        text, inputs["input_ids"].shape[1] - 576, [576.0] * text.num_hidden_layers, 4
    )
    assert counted == held


@pytest.mark.parametrize("name", ["divprune", "adaptinfer", "sparsevlm", "fastv", "divprune+fastv"])
def test_pruned_costs_are_those_of_the_pruned_forward(name, tiny):
    """Layers and logits alone: what a method computes to select is its own time, not the prefill's."""
    model, family = tiny.model, family_of(tiny.model)
    if build(name).needs & family.lacks:
        pytest.skip("refused")
    inputs = tiny.inputs([[([0], "Is there a 7?")]])
    model.set_attn_implementation("eager")
    experts = family.decoder._can_set_experts_implementation()
    if experts:  # grouped products are not counted
        family.decoder.set_experts_implementation("eager")
    try:
        with (
            build(name, budget=6)(model) as trace,
            FlopCounterMode(display=False) as counter,
            torch.no_grad(),
        ):
            cache = model(**inputs, use_cache=True, logits_to_keep=1)[CACHE]
    finally:
        model.set_attn_implementation("sdpa")
        if experts:
            family.decoder.set_experts_implementation("grouped_mm")
    (decoder,) = (path for path, module in model.named_modules() if module is family.decoder)
    counts = {
        module.partition(".")[2]: sum(ops.values())
        for module, ops in counter.get_flop_counts().items()
    }
    text, spent = model.config.get_text_config(), counts["lm_head"]
    question = int((inputs["input_ids"] != family.image_token).sum())
    for number, layer in enumerate(family.decoder.layers):
        own = f"{decoder}.layers.{number}"
        parts = ["self_attn", "mlp"]
        if linear := getattr(layer, "linear_attn", None):
            # its state is updated in chunks, which costs more than the equations say
            names = [n for n, part in linear.named_modules() if isinstance(part, torch.nn.Linear)]
            parts = ["mlp", *(f"linear_attn.{n}" for n in names)]
            weights = sum(linear.get_submodule(n).weight.numel() for n in names)
            uncounted = 2 * (linear_attention_weights(text) - weights)
            spent += uncounted * (question + trace.layer_tokens[number])
            assert weights < linear_attention_weights(text) < 1.5 * weights
        spent += sum(counts[f"{own}.{part}"] for part in parts)
    assert 5 < sum(trace.layer_tokens) / len(trace.layer_tokens) <= 6 < trace.available[0]
    if family.row_breaks:  # the costs of ends of rows are counted whether they stay or not
        lengths = [layer.keys.shape[2] for layer in cache.layers]
        assert lengths[-1] - trace.layer_tokens[-1] < question
        return
    assert prefill_flops(text, question, trace.layer_tokens) == pytest.approx(spent, rel=0.01)
    held = sum(
        t.nbytes for layer in cache.layers if getattr(layer, "keys", None) is not None
        for t in (layer.keys, layer.values)
    )  # fmt: skip
    assert key_value_bytes(text, question, trace.layer_tokens, 4) == held
