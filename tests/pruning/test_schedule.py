"""Schedules of the methods that cut inside the language model."""

import pytest

from vlm_prune.pruning import METHODS, DecoderPruner

INSIDE = [name for name, method in METHODS.items() if issubclass(method, DecoderPruner)]


def computed(cuts, layers, tokens=576):
    """Image tokens that each layer computes."""
    at = {cut.layer: cut.keep for cut in cuts}
    out = []
    for layer in range(layers):
        out.append(at.get(layer, out[-1] if out else tokens))
    return out


@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize("layers", [6, 12, 28, 32, 40])
@pytest.mark.parametrize("budget", [32, 64, 128, 192, 300, 576])
def test_the_mean_over_layers_is_the_budget(name, layers, budget):
    spent = computed(METHODS[name](budget=budget).cuts(576, layers), layers)
    assert budget - 1 < sum(spent) / layers <= budget
    assert spent == sorted(spent, reverse=True)


@pytest.mark.parametrize(
    ("name", "preset", "expected"),
    [
        ("fastv", "r50", [(2, 288)]),
        ("fastv", "r75", [(2, 144)]),
        ("pyramiddrop", "paper", [(8, 288), (16, 144), (24, 72)]),
        ("adaptinfer", "64", [(2, 133), (11, 27), (21, 3)]),
        # 510, 52 and 15 dropped tokens come back as 16, 2 and 1
        ("sparsevlm", "64", [(3, 66 + 16), (7, 30 + 2), (16, 17 + 1)]),
    ],
)
def test_presets_are_the_papers(name, preset, expected):
    cuts = METHODS[name](preset=preset).cuts(576, 32)
    assert [(cut.layer, cut.keep) for cut in cuts] == expected
