"""Every budget that an image allows is met by every method, at any depth."""

import pytest
import tiny_families
import torch
from tiny_families import Tiny, leaves_images, refused_on_images

from vlm_prune.pruning import METHODS, Cascade, DecoderPruner
from vlm_prune.pruning.downsample import grid_for
from vlm_prune.pruning.registry import build
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.families import FAMILIES, family_of
from vlm_prune.vlm.tokens import VisionTokens

INSIDE = [name for name, method in METHODS.items() if issubclass(method, DecoderPruner)]
MERGED = [f"{name}+merge" for name in INSIDE]
EVERY = [*METHODS, *MERGED, "divprune+merge+pyramiddrop"]
TURNS = [[([0], "Is there a 7?")], [([1, 2], "red?")]]


def computed(method, tokens, layers):
    """Image tokens that each layer computes of an image of `tokens`."""
    now = method.entering(tokens) if isinstance(method, Cascade) else tokens
    counts = {cut.layer: cut.keep for cut in method.cuts(tokens, layers)}
    spent = []
    for layer in range(layers):
        now = counts.get(layer, now)
        spent.append(now)
    return spent


@pytest.mark.parametrize("name", [*INSIDE, "cascade"])
def test_all_budgets_on_1_to_48_layers_are_the_mean_over_layers(name):
    """No count rises, and each layer has at least one token of each image."""
    for tokens in (1, 2, 5, 16):
        for budget in range(1, tokens + 1):
            method = build(name, budget=budget)
            for layers in range(1, 49):
                spent = computed(method, tokens, layers)
                case = name, tokens, budget, layers, spent
                assert budget - 1 < sum(spent) / layers <= budget, case
                assert spent == sorted(spent, reverse=True) and spent[-1] >= 1, case


@pytest.mark.parametrize("budget", [0.01, 0.1, 0.3, 0.5, 0.9, 1.0])
def test_a_cascades_share_is_met_whatever_it_rounds_to(budget):
    for tokens in range(1, 60):
        method = build("cascade", budget=budget)
        wanted = max(1, round(budget * tokens))
        assert wanted - 1 < sum(computed(method, tokens, 12)) / 12 <= wanted


def assert_met(tiny, name, budget):
    """Run a method on two prompts, one of which has two images; returns what was traced."""
    method = build(name, budget=budget)
    if refused_on_images(method, tiny.model):
        return None
    inputs, inside = tiny.inputs(TURNS), getattr(method, "inside", method)
    try:
        with method(tiny.model) as trace, torch.no_grad():
            logits = tiny.model(**inputs).logits
    except InputError as refusal:  # no cut can stand where such a budget is not spent yet
        assert "is spent before layer" in str(refusal)
        assert inside.depths_on(family_of(tiny.model))[0] > 0
        return None
    assert logits.isfinite().all()
    sizes = {image: g.size for g in tiny.encode(inputs).groups for image in g.members}
    for image, available in enumerate(trace.available):
        mean = sum(counts[image] for counts in trace.computed) / len(trace.computed)
        whole = name == "none" or leaves_images(method, tiny.model)
        wanted = available if whole else min(budget, available)
        assert mean <= wanted
        if sizes[image] <= wanted < available:
            wanted = sizes[image] - 1  # one more would bring all newlines
        if isinstance(method, Cascade) and sizes[image] <= method.entering(available) < available:
            wanted -= 1  # fewer enter than the cuts inside count on
        assert name == "downsample" or mean > wanted - 1
    return trace


@pytest.mark.parametrize("name", [*INSIDE, "cascade", "adaptinfer+merge", "visionzip"])
def test_the_smallest_budget_is_met_on_every_family(name, tiny):
    assert_met(tiny, name, 1)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("layers", [1, 5])
def test_the_smallest_budget_is_met_at_any_depth(name, layers, monkeypatch):
    monkeypatch.setattr(tiny_families, "LAYERS", layers)
    assert_met(Tiny("llava"), name, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "layers"), [("llava", 1), ("llava", 48), *((family, 4) for family in FAMILIES)]
)
@pytest.mark.parametrize("name", EVERY)
def test_all_budgets_are_met_on_every_family(family, name, layers, monkeypatch):
    monkeypatch.setattr(tiny_families, "LAYERS", layers)
    tiny = Tiny(family)
    traces = [
        assert_met(tiny, name, budget)
        for budget in range(1, max(tiny.encode(tiny.inputs(TURNS)).counts))
    ]
    refused = refused_on_images(build(name), tiny.model)
    assert any(trace is not None for trace in traces) != refused


@pytest.mark.parametrize("name", ["adaptinfer", "adaptinfer+merge"])
def test_a_preset_may_keep_nothing_after_its_last_cut(name, tiny):
    """The authors' counts for a mean of 32 tokens end with none."""
    if build(name).needs & family_of(tiny.model).lacks:
        pytest.skip("refused")
    with build(name, preset="32")(tiny.model) as trace, torch.no_grad():
        logits = tiny.model(**tiny.inputs(TURNS)).logits
    assert [len(kept) for kept in trace.kept] == [0, 0, 0] and logits.isfinite().all()


@pytest.mark.parametrize("patch", [7, 14, 16, 32])
def test_a_smaller_image_has_as_many_tokens_as_the_budget_allows(patch, monkeypatch):
    """Whatever the patches of the checkpoint: `downsample` asks the model."""
    config = tiny_families.vit

    def vit(**more):
        if "patch_size" in more:
            more |= {"image_size": 5 * patch, "patch_size": patch}
        return config(**more)

    monkeypatch.setattr(tiny_families, "vit", vit)
    tiny = Tiny("llava")
    processor = tiny.processor
    processor.patch_size = patch
    side = 5 * patch
    processor.image_processor.size = {"shortest_edge": side}
    processor.image_processor.crop_size = {"height": side, "width": side}
    for budget, kept in ((1, 1), (4, 4), (8, 6), (9, 9), (25, 25)):
        trace = assert_met(tiny, "downsample", budget)
        assert [len(own) for own in trace.kept] == [kept] * 3
        assert trace.available == [25] * 3


@pytest.mark.parametrize(
    ("k", "shape", "grid"),
    [(1, (5, 5), (1, 1)), (1, (2, 9), (1, 1)), (5, (1, 10), (1, 5)), (3, (9, 2), (3, 1))],
)
def test_a_long_image_has_a_small_grid_too(k, shape, grid):
    assert grid_for(k, *shape) == grid


def test_newlines_come_with_all_tokens_and_never_with_fewer():
    """Of 30 placeholders 26 are tokens: a budget of 26 to 29 keeps 25, as 26 would bring the rest."""
    features = torch.randn(1, 26, 4)
    tokens = VisionTokens(
        features=features, projected=features, grids=((2, 3), (4, 5)), seeds=(0,), projector=None,
        query_key=None, available=30,
    )  # fmt: skip
    counts = {budget: build("random", budget=budget).count(tokens) for budget in range(1, 31)}
    assert counts == {budget: min(budget, 25) for budget in range(1, 30)} | {30: 26}
    assert build("random", budget=1.0).count(tokens) == 26
    assert build("random", budget=26 / 30).count(tokens) == 25


@pytest.mark.parametrize("share", [0, 1])
def test_a_budget_of_an_images_tokens_leaves_room_for_no_newline(share):
    tiny = Tiny("llava_next")
    inputs = tiny.inputs([[([1], "red?")]])
    (group,) = tiny.encode(inputs).groups
    whole, tokens = group.tokens.available, group.size
    assert whole > tokens
    budget = whole if share else tokens
    with build("divprune", budget=budget)(tiny.model) as trace, torch.no_grad():
        tiny.model(**inputs)
    assert len(trace.kept[0]) == (whole if share else tokens - 1)
    assert share or set(trace.kept[0].tolist()) < set(group.indices.tolist())
