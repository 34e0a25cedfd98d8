"""Cascades and merging."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cosine_similarity

from vlm_prune.pruning import (
    METHODS,
    AdaptInfer,
    Cascade,
    Dart,
    DivPrune,
    FastV,
    Merge,
    Random,
    VideoPruner,
    merging,
)
from vlm_prune.pruning.registry import build
from vlm_prune.vlm.common.errors import InputError

INSIDE = ("adaptinfer", "fastv", "sparsevlm", "pyramiddrop", "dart")
BEFORE = ("random", "fopru", "visionzip", "vispruner", "divprune", "cdpruner", "zoo-exact")
QUESTION = "What color is the star and is there a 7?"


@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("budget", [32, 100, 400, 576])
def test_a_cascade_meets_both_budgets(inside, budget, llava, vision, images, make_inputs):
    method = build(f"divprune+{inside}", budget=budget)
    with method(llava) as trace, torch.no_grad():
        llava(**make_inputs([(1, QUESTION)], images))
    entered = min(576, 2 * budget)
    assert [len(places) for places in trace.entered] == [entered] == [method.entering(576)]
    expected = DivPrune(budget=entered).reduce(vision).indices[0]
    assert trace.entered[0].tolist() == expected.tolist()
    assert budget - 1 < sum(trace.layer_tokens) / 6 <= budget
    assert set(trace.kept[0].tolist()) <= set(trace.entered[0].tolist())


@pytest.mark.parametrize("before", BEFORE)
def test_a_cascade_of_any_two_answers(before, llava, images, make_inputs):
    inputs = make_inputs([(1, QUESTION), (2, "Is there a 7?")], images)
    with build(f"{before}+fastv", budget=48)(llava) as trace:
        llava.generate(**inputs, max_new_tokens=2, min_new_tokens=2)
    assert len(trace.kept) == 3


def test_an_inside_method_that_keeps_all_leaves_the_first_ones_logits(llava, images, make_inputs):
    """With nothing to widen, all that enters is kept in every layer."""
    inputs = make_inputs([(1, QUESTION), (2, "Is there a 7?")], images)
    with DivPrune(budget=48)(llava), torch.no_grad():
        expected = llava(**inputs).logits
    with Cascade(DivPrune(), AdaptInfer(), budget=48, widening=1)(llava), torch.no_grad():
        logits = llava(**inputs).logits
    lengths = inputs["attention_mask"].sum(1) - torch.tensor([1, 2]) * (576 - 48)
    for ours, theirs, length in zip(logits, expected, lengths, strict=True):
        torch.testing.assert_close(ours[-length:], theirs[-length:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cache", [True, False])
def test_places_follow_the_images_through_beams(cache, llava, images, make_inputs):
    """Each beam of a row has that row's images, in their order."""
    inputs = make_inputs([(2, QUESTION), (1, QUESTION)], images)
    with Cascade(Random(), FastV(), budget=48)(llava) as trace:
        llava.generate(**inputs, num_beams=3, max_new_tokens=3, min_new_tokens=3, use_cache=cache)
    entered = [set(indices.tolist()) for indices in trace.entered]
    first, second, third = entered[0], entered[1], entered[6]
    assert entered == [first, second] * 3 + [third] * 3
    for indices, owner in zip(trace.kept, entered, strict=True):
        assert set(indices.tolist()) <= owner
    assert not set(trace.kept[1].tolist()) <= first


def assert_merged(kept, plain, tokens):
    """`kept` is `plain` with every other one of `tokens` (M, N, d) averaged in, by a loop."""
    for image, own in enumerate(tokens):
        places = plain.indices[image].tolist()
        groups = {place: [place] for place in places}
        for token in range(len(own)):
            if token not in groups:
                similar = cosine_similarity(own[token], own[places])
                groups[places[int(similar.argmax())]].append(token)
        means = torch.stack([own[groups[place]].mean(0) for place in places])
        assert kept.indices[image].tolist() == places
        torch.testing.assert_close(kept.features[image], means)


def test_merging_equals_a_loop(vision):
    kept = Merge(DivPrune(), budget=20).reduce(vision)
    assert_merged(kept, DivPrune(budget=20).reduce(vision), vision.projected)


def test_merging_at_a_cut_equals_a_loop():
    torch.manual_seed(0)
    features, question = torch.randn(2, 30, 8), torch.randn(2, 6, 8)
    keys = torch.randn(2, 30, 8), torch.randn(2, 6, 8)
    tokens = SimpleNamespace(
        features=features, question=question, question_mask=torch.ones(2, 6, dtype=torch.bool),
        keys=lambda: keys,
    )  # fmt: skip
    kept = merging(Dart()).reduce(tokens, 9)
    assert_merged(kept, Dart().reduce(tokens, 9), features)


def test_merging_at_a_cut_keeps_the_methods_hyperparameters():
    method = build("sparsevlm+merge", preset="64", recycle=0.1)
    plain = build("sparsevlm", preset="64", recycle=0.1)
    assert isinstance(method, type(plain)) and vars(method) == vars(plain)
    assert method.cuts(576, 32) == plain.cuts(576, 32)
    both = build("divprune+fastv+merge", budget=64, **{"inside.layer": 3})
    assert isinstance(both, Cascade) and both.inside.layer == 3
    assert type(both.inside).__name__ == "FastVMerge" and isinstance(both.pre, DivPrune)


def test_names_joined_by_plus():
    method = build("zoo+merge+adaptinfer", budget=0.25, seed=5)
    assert isinstance(method, Cascade) and isinstance(method.pre, Merge)
    assert isinstance(method.pre.method, METHODS["zoo"])
    assert (method.budget, method.seed, method.entering(576)) == (0.25, 5, 288)


def test_a_name_says_after_which_layer_a_method_cuts():
    assert build("fastv@5", budget=0.5) == FastV(budget=0.5, layer=5)
    method = build("divprune+dart@8+merge", budget=48, **{"inside.image_pivots": 2})
    assert (method.inside.layer, method.inside.image_pivots) == (8, 2)
    assert type(method.inside).__name__ == "DartMerge"
    # 2 x 48 x 8 layers and a third of it x 24: a mean of 48
    assert method.entering(576) == 96
    assert [(cut.layer, cut.keep) for cut in method.cuts(576, 32)] == [(8, 32)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("zoo-exact+adaptinfr", "did you mean 'adaptinfer'"),
        ("adaptinfer+zoo", "AdaptInfer does not choose tokens before"),
        ("downsample+adaptinfer", "Downsample does not choose tokens before"),
        ("zoo+divprune", "DivPrune does not act inside"),
        ("best+merge", "Best does not choose tokens before"),
        ("divprune@16", "DivPrune cannot cut after a decoder layer"),
        ("divprune+adaptinfer@9", "AdaptInfer cannot cut after a decoder layer"),
        ("divprune+fastv@", "fastv@ names no decoder layer"),
        ("apet@32", "layer 32 is out of range"),
        ("fastv@2+merge@3", "Merge cannot cut"),
    ],
)
def test_methods_that_do_not_go_together_are_refused(name, message):
    with pytest.raises(InputError, match=message):
        build(name, budget=64)


def test_widening_below_one_is_refused():
    with pytest.raises(InputError, match="widening"):
        Cascade(widening=0.5)


@pytest.mark.parametrize("wrapper", ["merge", "restore", "dedupe"])
@pytest.mark.parametrize(
    "name", [name for name, method in METHODS.items() if issubclass(method, VideoPruner)]
)
def test_methods_that_compare_frames_are_not_wrapped(name, wrapper):
    with pytest.raises(InputError, match="compares the frames of a video") as refusal:
        build(f"{name}+{wrapper}")
    assert "\n" not in str(refusal.value)
