"""Registering a method or a family is enough to have it held to the contracts."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
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
        if "families" in test:
            assert any("new_family" in case for case in methods), f"{test} leaves out a new family"
