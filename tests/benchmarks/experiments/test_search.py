"""The search: its candidates, that it resumes, and that it never looks at test questions."""

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from filelock import FileLock
from tiny_families import Tiny

from vlm_prune.benchmarks.evaluation import engine as run_engine
from vlm_prune.benchmarks.evaluation.records import RunConfig, Tokens, Variant
from vlm_prune.benchmarks.experiments import search as engine
from vlm_prune.benchmarks.stats.paired import difference, mcnemar
from vlm_prune.pruning import Best
from vlm_prune.vlm.load import config_of

FAST = ["--budget", "64", "--limit", "2", "--batch-size", "2", "--tasks", "exist,ocr"]
FEW = [
    Variant("divprune+merge", 64),
    Variant("fopru+fastv", 64, arguments={"widening": 2.0}),
    Variant("divprune+merge+dart", 64, arguments={"widening": 3.0}),
    Variant("divprune", 64, "original"),
]


def test_every_candidate_and_variation_builds_at_the_budget():
    found = engine.combinations(48, *engine.parts())
    assert len({str(variant) for variant in found}) == len(found) > 200
    varied = [new for variant in found for new in engine.variations(variant)]
    for variant in [*found, *varied]:
        variant.build(0).check(576, 6)
    assert {key for variant in varied for key in variant.arguments} >= {
        "method.queries", "pre.queries", "pre.method.queries", "pre.contextual", "inside.layer",
        "inside.image_pivots", "pre.important",
    }  # fmt: skip
    positions = {(variant.method, variant.positions) for variant in [*found, *varied]}
    assert positions >= {("divprune", "original"), ("fopru+dart", "original")}
    assert positions >= {("fopru+dart", "auto"), ("fopru+dart", "contiguous")}
    assert not positions & {("divprune", "auto"), ("divprune", "contiguous")}


def test_the_positions_that_won_are_those_of_best(tmp_path):
    every = [Variant("divprune", 64, "original"), Variant("fopru", 64)]
    scores = [{"a": np.ones(4)}, {"a": np.zeros(4)}]
    tokens = [Tokens(full=576.0, kept=64.0, layer_mean=64.0, papers=64.0)] * 2
    entry = engine._compared(every, engine.Round(scores, tokens), 0, 2)
    assert entry.combination == "divprune, positions=original" and entry.wins
    defined = {"layers": 7, "tokens": 576, "budgets": {"64": msgspec.to_builtins(entry)}}
    (tmp_path / "best.json").write_text(json.dumps(defined))
    best = Best(budget=64, definitions=str(tmp_path / "best.json"))
    assert best.definition(7) == "divprune, positions=original"
    assert best.chosen(576, 7).positions == "original"


@pytest.mark.parametrize(("family", "choice"), [("llava", True), ("qwen2_5_vl", False)])
def test_positions_are_chosen_where_a_model_leaves_a_choice(family, choice):
    config = RunConfig(family, Variant("none", 1.0), ("exist",), 1)
    searched = engine.Search(Tiny(family).model, None, config, 1, Path(), lambda *_: None)
    assert searched.works(Variant("divprune", 0.5))
    for positions in ("contiguous", "original"):
        assert searched.works(Variant("divprune", 0.5, positions)) is choice


def test_every_registered_method_is_a_rival_or_a_combination():
    assert set(engine.singles()) | engine.COMBINED | {"none"} == set(engine.image_methods())


def test_the_better_third_goes_on_and_ties_keep_their_order():
    every = [Variant("random", 32 + n % 2) for n in range(24)]
    scores = [{"a": np.array([float(n == 12 or n == 22)])} for n in range(24)]
    kept = engine._best(every, engine.Round(scores, [{}] * 24), 32, None)
    assert kept == [every[n] for n in (12, 22, 0, 2)]


def test_the_methods_that_answer_best_alone_are_combined():
    config = RunConfig("tiny", Variant("none", 1.0), ("exist",), 30)
    searched = engine.Search(
        Tiny("llava").model, None, config, 30, Path(), lambda *_: None, most_parts=2
    )
    rounds = []

    def measure(name, variants, limit, seed):
        rounds.append((name, limit, seed))
        right = {
            32: ("cdpruner", "visionzip", "fastv", "dart"),
            64: ("fopru", "scope", "dart", "sparsevlm"),
        }
        scores = [{"exist": np.array([float(v.method in right[v.budget])])} for v in variants]
        return engine.Round(scores, [{}] * len(variants))

    searched.measure = measure
    found = searched._parts([32, 64])
    assert rounds == [("parts", 10, 0)]
    assert {b: tuple(map(set, kinds)) for b, kinds in found.items()} == {
        32: ({"cdpruner", "visionzip"}, {"fastv", "dart"}),
        64: ({"fopru", "scope"}, {"dart", "sparsevlm"}),
    }
    combined = {variant.method for variant in engine.combinations(64, *found[64])}
    assert "fopru+merge+dart" in combined and len(combined) == 12


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(engine, "combinations", lambda *_: FEW)
    monkeypatch.setattr(engine, "singles", lambda: ["random", "fopru"])


def test_a_search_defines_best_and_resumes(run, checkpoint, tmp_path, few, monkeypatch):
    output, defined = tmp_path / "out", tmp_path / "best.json"
    arguments = ["--model", checkpoint, *FAST, "--output", output, "--definitions", defined]
    code, out, err = run("search", *arguments)
    assert code == 0, err
    found = json.loads(defined.read_text())
    entry = found["budgets"]["64"]
    assert found["layers"] == config_of(checkpoint).get_text_config().num_hidden_layers
    assert {other["method"] for other in entry["against"]} == {"random", "fopru"}
    assert all(63 < other["tokens"]["layer_mean"] <= 64 for other in [entry, *entry["against"]])
    assert entry["combination"].split(",")[0] in {variant.method for variant in FEW}
    assert "budget 64:" in out and entry["combination"] in (output / "search.md").read_text()
    assert Best(definitions=str(defined)).definition(7).startswith(entry["method"])
    configs = [json.loads(path.read_text())["config"] for path in output.glob("*/*/config.json")]
    assert {(c["split"], c["seed"]) for c in configs} == {("val", 0), ("val", 1)}
    assert len(list(output.glob("round-1/*"))) == len(FEW) and list(output.glob("varied/*"))
    assert len(list(output.glob("compared/*"))) == 3

    answer = run_engine._answer

    def no_answer(*_):
        raise AssertionError("a finished search answers nothing again")

    monkeypatch.setattr("vlm_prune.benchmarks.evaluation.engine._answer", no_answer)
    before = defined.read_text()
    defined.unlink()
    assert run("search", *arguments)[0] == 0
    assert defined.read_text() == before

    for log in output.glob("compared/*/samples.jsonl"):  # as a kill in a write leaves it
        first, second = log.read_text().splitlines(keepends=True)
        log.write_text(first + second[:40])
        log.with_name("results.json").unlink()
    defined.unlink()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("vlm_prune.benchmarks.evaluation.engine._answer", interrupted)
    code, _, err = run("search", *arguments)
    assert code == 130 and "resumes" in err and not defined.exists()
    for lock in output.glob("*/*/.lock"):
        with FileLock(lock, timeout=0):
            pass
    monkeypatch.setattr("vlm_prune.benchmarks.evaluation.engine._answer", answer)
    assert run("search", *arguments)[0] == 0
    assert defined.read_text() == before

    # of a model that the package has a file for it is that file
    packaged = {str(checkpoint): tmp_path / "best_one.json", "other": tmp_path / "best_other.json"}
    monkeypatch.setattr("vlm_prune.pruning.best.PACKAGED", packaged)
    assert run("search", *arguments[:-2])[0] == 0
    assert json.loads(packaged[str(checkpoint)].read_text())["budgets"] == {"64": entry}
    assert not packaged["other"].exists()


def test_a_combination_that_loses_is_reported_and_not_shipped():
    every = [Variant("divprune+fastv", 64, arguments={"widening": 2.0}), Variant("fopru", 64)]
    scores = [{"a": np.array([1.0, 0, 0, 1])}, {"a": np.array([1.0, 1, 1, 0])}]
    tokens = [
        Tokens(full=576.0, kept=30.0, layer_mean=64.0, papers=None),
        Tokens(full=576.0, kept=64.0, layer_mean=64.0, papers=64.0),
    ]
    entry = engine._compared(every, engine.Round(scores, tokens), 0, 2)
    assert entry.method == "fopru" and not entry.wins
    line = engine.search_verdict("64", entry)
    assert "no combination beats" in line and "not above fopru" in line
    assert engine.definition_table(entry)[2][3].startswith("-25.0 [")
    assert [row[1] for row in engine.definition_table(entry)[1:]] == [
        "30 / 64.0 / –",
        "64 / 64.0 / 64.0",
    ]


def test_paired_differences():
    ours, theirs = {"a": np.array([1.0, 1, 1, 1])}, {"a": np.array([0.0, 0, 0, 0])}
    assert difference(ours, theirs) == (1.0, (1.0, 1.0))
    assert mcnemar(ours, theirs) == pytest.approx(2 / 2**4)
    assert mcnemar(ours, ours) == 1.0
    two = {"a": np.ones(2), "b": np.zeros(50)}, {"a": np.zeros(2), "b": np.zeros(50)}
    assert difference(*two)[0] == 0.5  # tasks weigh the same


def test_the_interval_covers_the_difference_as_often_as_it_says():
    rng, covered = np.random.default_rng(0), 0
    for draw in range(200):
        theirs = rng.binomial(1, 0.6, 120).astype(float)
        ours = np.where(rng.random(120) < 0.5, theirs, rng.binomial(1, 0.8, 120))
        low, high = difference({"a": ours}, {"a": theirs}, 400, draw)[1]
        covered += low <= 0.1 <= high
    assert 0.9 <= covered / 200 <= 0.99


def test_wrong_input_is_one_line(run, checkpoint, tmp_path):
    for wrong in (["--budget", "600"], ["--limit", "1"], ["--budget", "x"]):
        code, _, err = run(
            "search", "--model", checkpoint, "--output", tmp_path / "out", "--definitions",
            tmp_path / "best.json", "--limit", "6", *wrong,
        )  # fmt: skip
        assert code == 2 and len(err.strip().splitlines()) == 1
    for model in (["--model", checkpoint], ["--adapter", checkpoint]):
        code, _, err = run("search", *model, "--output", tmp_path / "out")
        assert code == 2 and len(err.strip().splitlines()) == 1
        assert "files for tiny and smol alone; give --definitions" in err
    assert not list(tmp_path.iterdir())
