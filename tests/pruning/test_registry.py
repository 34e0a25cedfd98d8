"""Registering a method or a family is enough to have it held to the contracts."""

import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from vlm_prune.pruning import METHODS, DivPrune
from vlm_prune.pruning.registry import build
from vlm_prune.vlm.common.errors import InputError

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
CONTRACTS = [TESTS / "pruning" / "test_contract.py", TESTS / "pruning" / "families"]
REGISTERING = """
from vlm_prune.pruning import METHODS, DivPrune
from vlm_prune.vlm.families import FAMILIES, family_of

METHODS.register("new-method", DivPrune)
FAMILIES.register("new_family", FAMILIES["llava"])
"""


def test_what_is_registered_is_held_to_the_contracts(tmp_path):
    """What pytest collects where a plug-in has registered one of each."""
    (tmp_path / "registering.py").write_text(REGISTERING)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", ""]
    collected = subprocess.run(
        [*command, "-p", "registering", *CONTRACTS], cwd=TESTS.parent, capture_output=True, check=False,
        text=True, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert collected.returncode == 0, collected.stdout + collected.stderr
    cases = dict[str, set[str]]()
    for line in collected.stdout.splitlines():
        if "[" in line:
            test, _, case = line.rstrip("]").partition("[")
            cases.setdefault(test, set()).add(case)
    held = [test for test, found in cases.items() if any("divprune" in case for case in found)]
    assert len(held) > 12
    for test in held:
        methods = {case for case in cases[test] if "new-method" in case}
        assert methods, f"{test} does not try a new method"
        if "families" in test and "test_video" not in test:  # the new family takes no videos
            assert any("new_family" in case for case in methods), f"{test} leaves out a new family"


PLUG_IN = """
from vlm_prune.pruning import DivPrune

MORE = {"from-a-plug-in": DivPrune}
"""


def test_a_package_that_is_installed_later_is_found(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="unknown method 'from-a-plug-in'"):
        build("from-a-plug-in")
    (tmp_path / "plug_in.py").write_text(PLUG_IN)
    described = tmp_path / "plug_in-1.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: plug-in\nVersion: 1\n")
    (described / "entry_points.txt").write_text("[vlm_prune.methods]\nmore = plug_in:MORE\n")
    assert isinstance(build("from-a-plug-in", budget=3), DivPrune)


@pytest.mark.parametrize("unknown", ["zo", "zo+adaptinfer", "zoo+adaptinfr", "zoo+merg", "zoo+"])
def test_an_unknown_part_of_a_name_is_refused_in_one_line(unknown):
    with pytest.raises(InputError, match="unknown method") as refusal:
        build(unknown)
    assert "\n" not in str(refusal.value)


def test_the_documentation_states_each_methods_positions():
    rows = {}
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        header = []
        for line in page.read_text().splitlines():
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
            if "positions" in cells:
                header = cells
            elif header and len(cells) == len(header):
                rows[cells[0].strip("`")] = cells[header.index("positions")]
            else:
                header = []
    for name, method in METHODS.items():
        assert rows[name] == method.authors_positions, name


ODD = (
    None,
    [],
    {},
    "x",
    "",
    True,
    -1,
    0,
    10**400,
    float("nan"),
    float("inf"),
    1.5,
    {"layers": "7"},
)


@pytest.mark.parametrize("name", METHODS)
def test_hyperparameters_are_taken_or_refused_in_one_line(name):
    for own in fields(METHODS[name]):
        for value in ODD:
            try:
                pruner = build(name, **{own.name: value})
            except InputError as error:
                assert len(str(error).splitlines()) == 1
                continue
            taken = getattr(pruner, own.name)
            assert taken in (value, str(value)) and type(taken) in (type(value), str)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("adaptinfer", {"schedule": 7}, "schedule 7 is none; give --schedule"),
        ("adaptinfer", {"schedule": {"layers": 7}}, r"no schedule \(no places\)"),
        ("adaptinfer", {"schedule": {"layers": "7", "places": [1], "shares": [1.0]}}, "Expected"),
        ("fastv", {"preset": []}, r"preset \[\] is not a text"),
        ("zoo", {"steps": 3}, "no hyperparameter 'steps'; did you mean 'step'"),
        (
            "zoo",
            {"x": 3},
            r"Zoo has no hyperparameter 'x' \(it has directions, step",
        ),
        ("divprune", {"x": 3}, r"\(it has none\)"),
        ("zoo-exact+fastv", {"inside.x": 3}, "FastV has no hyperparameter 'x'"),
        ("zoo-exact+fastv", {"outside.x": 3}, "has no part 'outside'"),
    ],
)
def test_wrong_hyperparameters_say_which_there_are(name, given, message):
    with pytest.raises(InputError, match=f"(?i){message}"):
        build(name, **given)


def test_a_number_may_name_a_preset():
    assert build("sparsevlm", preset=64).preset == "64"
