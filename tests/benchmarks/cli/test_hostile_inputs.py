"""A case of each kind of the table of wrong inputs; `tests/hostile_inputs.py` runs all of it."""

import hostile_inputs
import pytest

CASES = hostile_inputs.few()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    with hostile_inputs.prepared(folder) as port:
        yield folder, port


def test_the_table_is_large_and_each_command_and_script_is_in_it():
    chosen = hostile_inputs.select([])
    assert sum(not case.right for case in chosen) >= 400
    assert {case.arguments[0] for case in chosen if case.arguments} >= {
        command.split()[0] for command in hostile_inputs.SOUND
    }
    scripts = {path.stem for path in (hostile_inputs.ROOT / "scripts").glob("*.py")}
    assert {case.script for case in chosen} - {""} == scripts - {"document_tables"}


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_wrong_input_is_met_with_one_clear_line(case, inputs):
    outcome = hostile_inputs.meet(case, *inputs)
    assert outcome.kind == "clear", f"{outcome.kind}: {outcome.why}\n{outcome.out}{outcome.err}"
