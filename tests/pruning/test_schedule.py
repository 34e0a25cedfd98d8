"""Schedules of the methods that cut inside the language model."""

from types import SimpleNamespace

import pytest
from transformers import Gemma4TextConfig, LlamaConfig, Qwen3_5TextConfig

from vlm_prune.pruning import METHODS, DecoderPruner
from vlm_prune.pruning.schedule import Schedule, check_layer, solve_counts
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.layer_pruning import cut_depths

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


def depths_in(config, reads, last=None):
    layers = config.num_hidden_layers
    decoder = SimpleNamespace(config=config, layers=[None] * layers)
    return cut_depths(decoder, reads, layers - 1 if last is None else last)


def test_cuts_stand_next_to_attention_that_can_be_read():
    assert depths_in(LlamaConfig(), "before") == depths_in(LlamaConfig(), "after") == [*range(32)]
    linear = Qwen3_5TextConfig(num_hidden_layers=32)
    assert depths_in(linear, "before") == [4, 8, 12, 16, 20, 24, 28]
    assert depths_in(linear, "after") == [3, 7, 11, 15, 19, 23, 27, 31]
    assert depths_in(Gemma4TextConfig(num_hidden_layers=35), "before", 13) == [*range(14)]


@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize("budget", [96, 300, 576])
@pytest.mark.parametrize(("layers", "last"), [(32, 31), (35, 13)])
def test_the_mean_is_the_budget_where_cuts_cannot_stand_anywhere(name, budget, layers, last):
    method = METHODS[name](budget=budget)
    config = Qwen3_5TextConfig(num_hidden_layers=layers)
    allowed = depths_in(config, getattr(method, "inside", method).reads, last)
    cuts = method.cuts(576, layers, allowed)
    assert {cut.layer for cut in cuts} <= {*allowed}
    spent = computed(cuts, layers)
    assert budget - 1 < sum(spent) / layers <= budget
    assert spent == sorted(spent, reverse=True)


def test_a_cut_goes_to_the_nearest_place_or_says_what_it_costs():
    allowed = depths_in(Qwen3_5TextConfig(num_hidden_layers=32), "before")
    assert [c.layer for c in METHODS["fastv"](budget=96).cuts(576, 32, allowed)] == [4]
    deep = METHODS["adaptinfer"](preset="64").cuts(576, 32, allowed)
    assert [(cut.layer, cut.keep) for cut in deep] == [(4, 133), (12, 27), (20, 3)]
    with pytest.raises(InputError, match="spent before layer 4 of 32.* give 73 or more"):
        METHODS["fastv"](budget=72).cuts(576, 32, allowed)
    assert METHODS["fastv"](budget=73).cuts(576, 32, allowed)[0].keep >= 1


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


# image tokens, or shares of them, after each cut, as the papers and the authors' code have them
PRESETS = {
    "adaptinfer": {
        "128": (290, 72, 18),
        "64": (133, 27, 3),
        "48": (80, 24, 2),
        "32": (40, 12, 0),
        "128-13b": (300, 94, 30),
        "64-13b": (148, 40, 5),
    },
    "fastv": {"r50": (0.5,), "r75": (0.25,)},
    "pyramiddrop": {"paper": (0.5, 0.25, 0.125)},
    "sparsevlm": {
        "192": (300, 200, 110),
        "128": (303, 110, 36),
        "96": (238, 48, 26),
        "64": (66, 30, 17),
    },
}


@pytest.mark.parametrize("name", [name for name in INSIDE if METHODS[name].presets])
def test_every_preset_has_the_authors_numbers(name):
    assert dict(METHODS[name].presets) == PRESETS[name]


@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize(("layers", "places"), [(8, [4, 6]), (16, [8, 12])])
def test_a_schedule_replaces_the_pattern_at_any_depth(name, layers, places):
    found = Schedule(layers=8, places=[4, 6], shares=[2, 1])
    cuts = METHODS[name](budget=400, schedule=found).cuts(576, layers)
    assert [cut.layer for cut in cuts] == places
    assert 399 < sum(computed(cuts, layers)) / layers <= 400
    assert cuts[0].keep == pytest.approx(2 * cuts[1].keep, abs=2)


def test_a_schedule_may_be_its_fields():
    fields = {"layers": 8, "places": [4], "shares": [1]}
    given, expected = (
        METHODS["adaptinfer"](budget=400, schedule=schedule).cuts(576, 8)
        for schedule in (fields, Schedule(**fields))
    )
    assert given == expected


@pytest.mark.parametrize(
    "fields",
    [
        {"places": [4, 4]},
        {"places": [6, 4]},
        {"places": [4, 8]},
        {"places": [-1, 4]},
        {"shares": [1, 2]},
        {"shares": [1, 0]},
        {"shares": [1]},
        {"places": [], "shares": []},
    ],
)
def test_schedules_that_cannot_be_are_refused(fields):
    with pytest.raises(InputError, match="a schedule needs"):
        Schedule(**{"layers": 8, "places": [4, 6], "shares": [2, 1]} | fields)


def test_a_preset_and_a_schedule_contradict():
    with pytest.raises(InputError, match="give one"):
        METHODS["adaptinfer"](preset="64", schedule=Schedule(8, (4,), (1,)))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"layers": "a", "places": 1, "shares": 2}'])
def test_files_that_hold_no_schedule_are_refused(tmp_path, content):
    (tmp_path / "schedule.json").write_text(content)
    with pytest.raises(InputError, match="holds no schedule|as JSON|a JSON object"):
        Schedule.read(tmp_path / "schedule.json")


@pytest.mark.parametrize(
    ("name", "preset", "computed_mean", "papers"),
    [
        ("adaptinfer", "64", 82.9, 65.0),
        ("adaptinfer", "128", 146.25, 128.8),
        ("sparsevlm", "64", 82.25, 61.7),
        ("pyramiddrop", "paper", 270.0, 270.0),
        ("fastv", "r50", 306.0, 306.0),
    ],
)
def test_papers_count_their_tokens_their_own_way(name, preset, computed_mean, papers):
    method = METHODS[name](preset=preset)
    layers = [float(count) for count in computed(method.cuts(576, 32), 32)]
    assert sum(layers) / 32 == pytest.approx(computed_mean, abs=0.05)
    assert method.papers_count(576, layers) == pytest.approx(papers, abs=0.05)


def test_counts_without_a_paper_are_given_where_they_are_plain():
    assert METHODS["dart"]().papers_count(576, [576.0, 64.0, 64.0]) == 64
    assert METHODS["random"]().papers_count(576, [64.0, 64.0]) == 64
    assert METHODS["cascade"]().papers_count(576, [128.0, 64.0]) is None


def test_cuts_that_fall_on_one_place_are_one_cut():
    cuts = METHODS["sparsevlm"](budget=300).cuts(576, 6)
    assert [cut.layer for cut in cuts] == [1, 3]


def test_what_rounding_leaves_goes_to_each_segment_that_can_take_it():
    # 11 x 10 + 3 x 2 of 120 are proportional; 4 are left, too few for the first segment
    assert solve_counts(10, 100, 12, [0, 10], [3, 1]) == [11, 5]
    assert solve_counts(10, 11, 12, [0, 10], [3, 3]) == [10, 10]


@pytest.mark.parametrize("layer", [-1, 32])
def test_a_layer_that_no_cut_can_follow_is_refused(layer):
    with pytest.raises(InputError, match="give 0 to 31, of 32"):
        check_layer(layer)
    check_layer(0)
    check_layer(31)
