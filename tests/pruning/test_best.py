"""`best` stands for what the search found at the nearest budget."""

import json
from pathlib import Path

import pytest
import torch
from tiny_families import Tiny

from vlm_prune.pruning import Best, Cascade, DivPrune, FastV, FoPru, Merge, registry
from vlm_prune.pruning.best import packaged_definitions
from vlm_prune.pruning.registry import build
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.families import family_of
from vlm_prune.vlm.load import config_of


@pytest.fixture
def found(tmp_path):
    entries = {
        "32": {"method": "fopru", "arguments": {"strategy": "row"}, "positions": "original"},
        "128": {
            "method": "divprune+merge+fastv",
            "arguments": {"widening": 3, "inside.layer": 4},
        },
    }
    path = tmp_path / "best.json"
    path.write_text(json.dumps({"layers": 7, "tokens": 576, "budgets": entries}))
    return str(path)


@pytest.mark.parametrize("budget", [1, 16, 63, 0.1])
def test_small_budgets_take_the_smaller_definition(found, budget):
    chosen = Best(budget=budget, definitions=found, seed=4).chosen(576, 7)
    assert isinstance(chosen, FoPru) and chosen.strategy == "row"
    assert (chosen.budget, chosen.seed) == (58 if budget == 0.1 else budget, 4)
    assert chosen.positions == "original"
    told = Best(budget=budget, definitions=found, positions="contiguous")
    assert told.chosen(576, 7).positions == "contiguous"
    assert told.definition(7) == "fopru, strategy=row, positions=original"


@pytest.mark.parametrize(("budget", "tokens"), [(65, 576), (576, 576), (0.2, 2880), (512, 2304)])
def test_larger_ones_the_larger_by_share_of_the_image(found, budget, tokens):
    best = Best(budget=budget, definitions=found, positions="original")
    chosen = best.chosen(tokens, 7)
    assert isinstance(chosen, Cascade) and isinstance(chosen.pre, Merge)
    assert isinstance(chosen.pre.method, DivPrune) and chosen.inside.layer == 4
    assert (chosen.widening, chosen.positions) == (3, "original")
    assert best.definition(7) == "divprune+merge+fastv, widening=3, inside.layer=4"


def test_its_count_is_that_of_what_it_stands_for(found):
    assert Best(budget=32, definitions=found).papers_count(576, [32.0] * 6) == 32
    assert Best(budget=64 * 3, definitions=found).papers_count(576, [576.0, 64.0]) is None


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", '{"layers": 7, "tokens": 576, "budgets": {}}', '{"budgets": 1}',
        '{"tokens": 576, "budgets": {"64": {"method": "divprune", "arguments": {}}}}',
    ],
)  # fmt: skip
def test_files_that_define_nothing_are_refused(tmp_path, content):
    (tmp_path / "best.json").write_text(content)
    with pytest.raises(InputError, match="give the best.json of vlm-prune search"):
        Best(definitions=str(tmp_path / "best.json")).chosen(576, 7)


def test_the_packaged_definitions_meet_their_budgets():
    for name, found in packaged_definitions().items():
        assert found.layers == config_of(name).get_text_config().num_hidden_layers
        for budget in (32, 64, 128):
            best = Best(budget=budget)
            best.check(576, found.layers)
            assert best.chosen(576, found.layers).budget == budget
            assert best.definition(found.layers) == Best(
                budget=budget, definitions=name
            ).definition(1)


@pytest.fixture
def two(tmp_path, monkeypatch):
    """The package has definitions of 7 layers and of 30."""
    every = {"tiny": (7, "fastv"), "smol": (30, "zoo-exact+merge")}
    paths = {name: tmp_path / f"best_{name}.json" for name in every}
    for name, (layers, method) in every.items():
        entries = {"64": {"method": method, "arguments": {}}}
        content = {"layers": layers, "tokens": 576, "budgets": entries}
        paths[name].write_text(json.dumps(content))
    monkeypatch.setattr("vlm_prune.pruning.best.PACKAGED", paths)
    return paths


@pytest.mark.parametrize(
    ("layers", "method"),
    [(1, FastV), (7, FastV), (14, FastV), (15, Merge), (30, Merge), (80, Merge)],
)
def test_a_model_gets_what_was_found_at_the_nearest_depth(two, layers, method):
    """14 is nearer to 7 than to 30 as a ratio, and 15 is not."""
    best = Best(budget=64)
    assert isinstance(best.chosen(576, layers), method)
    name = best.definition(layers)
    assert name == ("fastv" if method is FastV else "zoo-exact+merge")
    computed = [576.0, 64.0, *[32.0] * (layers - 1)]
    counted = build(name).papers_count(576, computed[:layers])
    assert best.papers_count(576, computed[:layers]) == counted
    assert best.needs_on(layers) == build(name).needs
    assert build("fastv").needs < best.needs == build("zoo-exact+merge").needs


def test_an_embedded_model_names_its_definitions(two):
    assert Best(definitions="smol").definition(7) == "zoo-exact+merge"
    assert Best(definitions="tiny").definition(30) == "fastv"
    two["smol"].unlink()
    assert Best().definition(30) == "fastv"
    with pytest.raises(InputError, match=r"cannot read .*best_smol.json"):
        Best(definitions="smol").definition(30)
    with pytest.raises(InputError, match="cannot read smoll"):
        Best(definitions="smoll").definition(30)


def test_models_of_two_depths(two, llava):
    """Each block is that of the method that the model's depth chooses."""
    family = family_of(llava)
    assert isinstance(Best(budget=64).resolved(family), FastV)
    two["tiny"].write_text(two["tiny"].read_text().replace('"layers": 7', '"layers": 300'))
    assert isinstance(Best(budget=64).resolved(family), Merge)


@pytest.mark.parametrize("tiny", ["smolvlm"], indirect=True)
def test_a_model_needs_what_its_own_definitions_do(two, tiny):
    """This one has a linear projector."""
    assert Best(budget=0.5).admit(tiny.model).model is tiny.model
    two["smol"].write_text(two["smol"].read_text().replace('"layers": 30', '"layers": 5'))
    with pytest.raises(InputError, match="Best needs a two-layer projector"):
        Best(budget=0.5).admit(tiny.model)


@pytest.mark.parametrize(("budget", "kind"), [(0.5, DivPrune), (0.1, FoPru), (0.3, DivPrune)])
def test_images_of_any_size_have_shares(tmp_path, budget, kind):
    entries = {
        "0.11": {"method": "fopru", "arguments": {}},
        "0.5": {"method": "divprune", "arguments": {}},
    }
    path = tmp_path / "best.json"
    path.write_text(json.dumps({"layers": 7, "tokens": None, "budgets": entries}))
    tiny, best = Tiny("qwen2_5_vl"), Best(budget=budget, definitions=str(path))
    assert isinstance(best.chosen(None, 7), kind) and best.chosen(None, 7).budget == budget
    with best(tiny.model) as trace, torch.no_grad():
        tiny.model(**tiny.inputs([[([1, 2], "red?")]]))
    assert [len(kept) for kept in trace.kept] == [round(budget * n) for n in trace.available]
    with pytest.raises(InputError, match="give a share such as 0.11 instead of 64"):
        Best(budget=64, definitions=str(path))(tiny.model)


@pytest.mark.parametrize(
    ("tokens", "budget", "kind"),
    [
        (None, "64", "a share"),
        (None, "0", "a share"),
        (576, "0.5", "a number of tokens"),
        (576, "0", "a number of tokens"),
        (576, "-64", "a number of tokens"),
    ],
)
def test_budgets_of_another_kind_are_refused(tmp_path, tokens, budget, kind):
    content = {
        "layers": 7,
        "tokens": tokens,
        "budgets": {budget: {"method": "divprune", "arguments": {}}},
    }
    (tmp_path / "best.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=f"budget {budget} is not {kind}"):
        Best(definitions=str(tmp_path / "best.json")).chosen(576, 7)


def test_a_family_that_it_does_not_fit_is_refused(tiny):
    """Where the projector has not what a definition needs."""
    best = Best(budget=1.0)
    family = family_of(tiny.model)
    if not best.needs_on(len(family.decoder.layers)) & family.lacks:
        return
    with pytest.raises(InputError, match=r"Best needs a .*give one of") as refusal:
        best(tiny.model)
    assert "\n" not in str(refusal.value)


def test_a_budget_above_the_images_tokens_is_refused(llava):
    with pytest.raises(InputError, match="above the 576 tokens"):
        Best(budget=577)(llava)


def test_a_block_reads_no_file_and_looks_for_no_package(llava, found, monkeypatch):
    best = Best(budget=64, definitions=found)
    with best(llava):
        pass
    monkeypatch.setattr("pathlib.Path.read_text", None)
    monkeypatch.setattr(registry, "entry_points", None)
    with best(llava):
        pass


def test_a_definition_that_changes_is_read_again(found):
    assert isinstance(Best(budget=32, definitions=found).chosen(576, 7), FoPru)
    entries = {"32": {"method": "divprune", "arguments": {}}}
    Path(found).write_text(json.dumps({"layers": 7, "tokens": 576, "budgets": entries}))
    assert isinstance(Best(budget=32, definitions=found).chosen(576, 7), DivPrune)


@pytest.mark.parametrize(("tokens", "budget"), [(576, 1), (None, 1.0)])
def test_one_token_and_all_tokens_are_budgets(tmp_path, tokens, budget):
    content = {
        "layers": 7,
        "tokens": tokens,
        "budgets": {budget: {"method": "divprune", "arguments": {}}},
    }
    (tmp_path / "best.json").write_text(json.dumps(content))
    best = Best(budget=budget, definitions=str(tmp_path / "best.json"))
    assert isinstance(best.chosen(tokens, 7), DivPrune)
