"""`best` stands for what the search found at the nearest budget."""

import json
from pathlib import Path

import pytest
import torch
from tiny_families import Tiny

from vlm_prune.pruning import Best, Cascade, DivPrune, FoPru, Merge, registry
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.families import family_of


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
    path.write_text(json.dumps({"tokens": 576, "budgets": entries}))
    return str(path)


@pytest.mark.parametrize("budget", [1, 16, 63, 0.1])
def test_small_budgets_take_the_smaller_definition(found, budget):
    chosen = Best(budget=budget, definitions=found, seed=4).chosen(576)
    assert isinstance(chosen, FoPru) and chosen.strategy == "row"
    assert (chosen.budget, chosen.seed) == (58 if budget == 0.1 else budget, 4)
    assert chosen.positions == "original"
    told = Best(budget=budget, definitions=found, positions="contiguous")
    assert told.chosen(576).positions == "contiguous"
    assert told.definition(576) == "fopru, strategy=row, positions=original"


@pytest.mark.parametrize(("budget", "tokens"), [(65, 576), (576, 576), (0.2, 2880), (512, 2304)])
def test_larger_ones_the_larger_by_share_of_the_image(found, budget, tokens):
    best = Best(budget=budget, definitions=found, positions="original")
    chosen = best.chosen(tokens)
    assert isinstance(chosen, Cascade) and isinstance(chosen.pre, Merge)
    assert isinstance(chosen.pre.method, DivPrune) and chosen.inside.layer == 4
    assert (chosen.widening, chosen.positions) == (3, "original")
    assert best.definition(tokens) == "divprune+merge+fastv, widening=3, inside.layer=4"


def test_its_count_is_that_of_what_it_stands_for(found):
    assert Best(budget=32, definitions=found).papers_count(576, [32.0] * 6) == 32
    assert Best(budget=64 * 3, definitions=found).papers_count(576, [576.0, 64.0]) is None


@pytest.mark.parametrize("content", ["", "[]", '{"tokens": 576, "budgets": {}}', '{"budgets": 1}'])
def test_files_that_define_nothing_are_refused(tmp_path, content):
    (tmp_path / "best.json").write_text(content)
    with pytest.raises(InputError, match="give the best.json of vlm-prune search"):
        Best(definitions=str(tmp_path / "best.json")).chosen(576)


def test_the_packaged_definitions_meet_their_budgets():
    for budget in (32, 64, 128):
        best = Best(budget=budget)
        best.check(576, 6)
        assert best.chosen(576).budget == budget and best.definition(576)


@pytest.mark.parametrize(("budget", "kind"), [(0.5, DivPrune), (0.1, FoPru), (0.3, DivPrune)])
def test_images_of_any_size_have_shares(tmp_path, budget, kind):
    entries = {
        "0.11": {"method": "fopru", "arguments": {}},
        "0.5": {"method": "divprune", "arguments": {}},
    }
    path = tmp_path / "best.json"
    path.write_text(json.dumps({"tokens": None, "budgets": entries}))
    tiny, best = Tiny("qwen2_5_vl"), Best(budget=budget, definitions=str(path))
    assert isinstance(best.chosen(None), kind) and best.chosen(None).budget == budget
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
    content = {"tokens": tokens, "budgets": {budget: {"method": "divprune", "arguments": {}}}}
    (tmp_path / "best.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=f"budget {budget} is not {kind}"):
        Best(definitions=str(tmp_path / "best.json")).chosen(576)


def test_a_family_that_it_does_not_fit_is_refused(tiny):
    """Where the projector has not what a definition needs."""
    best = Best(budget=1.0)
    if not best.needs & family_of(tiny.model).lacks:
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
    assert isinstance(Best(budget=32, definitions=found).chosen(576), FoPru)
    entries = {"32": {"method": "divprune", "arguments": {}}}
    Path(found).write_text(json.dumps({"tokens": 576, "budgets": entries}))
    assert isinstance(Best(budget=32, definitions=found).chosen(576), DivPrune)


@pytest.mark.parametrize(("tokens", "budget"), [(576, 1), (None, 1.0)])
def test_one_token_and_all_tokens_are_budgets(tmp_path, tokens, budget):
    content = {"tokens": tokens, "budgets": {budget: {"method": "divprune", "arguments": {}}}}
    (tmp_path / "best.json").write_text(json.dumps(content))
    best = Best(budget=budget, definitions=str(tmp_path / "best.json"))
    assert isinstance(best.chosen(tokens), DivPrune)
