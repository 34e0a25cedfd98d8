"""Each stored thing has one reader: whatever a file holds, it is a record or one clear line."""

import ast
import copy
import json
import os
import tracemalloc
from pathlib import Path

import msgspec
import numpy as np
import pytest
from run_folders import write_run

from vlm_prune.benchmarks.evaluation import records
from vlm_prune.benchmarks.evaluation.records import (
    FolderRecord,
    Machine,
    MeasuredRow,
    PairedRow,
    Results,
    RunConfig,
    SuiteResults,
    Variant,
)
from vlm_prune.benchmarks.evaluation.store import (
    RunFolder,
    check_kind,
    read_rows,
    read_run,
    read_versioned,
)
from vlm_prune.benchmarks.evaluation.summarize import summarize
from vlm_prune.benchmarks.experiments.search import SearchResults
from vlm_prune.learners.store import WEIGHTS
from vlm_prune.pruning.best import PACKAGED, definitions
from vlm_prune.pruning.schedule import Schedule
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.records import to_json

ROOT = Path(__file__).parents[3]
ODD = (None, True, -1, 1e300, "7", "", [], {}, [[]], {"a": None}, 10**400, "\ud800")
TEXTS = (
    "", "{", "null", "[]", "NaN", '"text"', "[" * 100_000, '{"a":' * 50_000, "\xff\xfe", "1" * 5000,
    '{"schema_version": 1}', '{"schema_version": 99}', '{"schema_version": "1"}',
)  # fmt: skip


def suite(folder):
    entry = {"n": 2, "accuracy": {"vlm": 0.5}, "differences": {}}
    task = entry | {"images": True, "accuracy_ci": {"vlm": [0.25, 0.75]}}
    run = write_run(folder)
    found = json.loads((run / "results.json").read_text())
    shared = ("schema_version", "seed", "config", "versions", "device", "command")
    return {key: found[key] for key in shared} | {
        "suite": "forgetting", "models": {"vlm": "tiny"}, "tasks": {"exist": task}, "text": entry,
        "images": entry, "skipped": {"vlm": {}},
    }  # fmt: skip


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Each stored thing: its sound content and what reads its path."""
    folder = tmp_path_factory.mktemp("sound")
    run = write_run(folder / "run", budget=4)
    parts = {name: json.loads((run / f"{name}.json").read_text()) for name in ("config", "results")}
    row = json.loads((run / "samples.jsonl").read_text().splitlines()[0])
    schedule = {"layers": 7, "places": [1, 3], "shares": [0.5, 0.25], "histogram": [1, 2]}
    return {
        "config.json": (parts["config"], lambda path: read_versioned(path, FolderRecord)),
        "results.json": (parts["results"], lambda path: read_versioned(path, Results)),
        "suite.json": (suite(folder / "suite"), lambda path: read_versioned(path, SuiteResults)),
        "samples.jsonl": (row, lambda path: read_rows(path, PairedRow)),
        "schedule.json": (schedule, Schedule.read),
        "best.json": (
            json.loads(PACKAGED["tiny"].read_text()),
            lambda path: definitions(str(path)),
        ),
    }


NAMES = ("config.json", "results.json", "suite.json", "samples.jsonl", "schedule.json", "best.json")


def places(content, path=()):
    """Where something stands in JSON: keys and indices from the top."""
    yield path
    if isinstance(content, dict):
        for key, value in content.items():
            yield from places(value, (*path, key))
    elif isinstance(content, list):
        for index, value in enumerate(content[:2]):
            yield from places(value, (*path, index))


def replaced(content, path, value):
    if not path:
        return value
    content = copy.deepcopy(content)
    part = content
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    return content


def removed(content, path):
    content = copy.deepcopy(content)
    part = content
    for key in path[:-1]:
        part = part[key]
    del part[path[-1]]
    return content


def outcome(read, path):
    """What reading gives, or None where it is refused as it should be."""
    try:
        return read(path)
    except InputError as error:
        assert str(path) in str(error) and len(str(error).splitlines()) == 1
        return None


@pytest.mark.parametrize("name", NAMES)
def test_no_text_is_taken_for_a_record(stored, tmp_path, name):
    content, read = stored[name]
    path = tmp_path / name
    for text in TEXTS:
        path.write_bytes(text.encode("latin-1"))
        found = outcome(read, path)
        # an empty log has no rows
        assert found is None or (name, text, found) == ("samples.jsonl", "", {}), text[:20]
    path.write_text(json.dumps(content) + "\n")
    assert read(path)


@pytest.mark.parametrize("name", NAMES)
def test_every_part_is_checked(stored, tmp_path, name):
    """Each part is replaced by each odd value and removed: refused, or read as a finite record."""
    content, read = stored[name]
    path, refused = tmp_path / name, 0
    for place in places(content):
        for value in (*ODD, float("nan"), float("inf")):
            path.write_text(json.dumps(replaced(content, place, value)) + "\n")
            found = outcome(read, path)
            refused += found is None
            if found is not None:
                assert "nan" not in repr(found).lower() and "inf" not in repr(found).split("'")[0]
        if place:
            path.write_text(json.dumps(removed(content, place)) + "\n")
            outcome(read, path)
    assert refused > 50


def test_records_are_written_as_they_are_read(stored, tmp_path):
    for name, kind in (("results.json", Results), ("suite.json", SuiteResults)):
        content, read = stored[name]
        record = msgspec.convert(content, kind)
        (tmp_path / name).write_text(to_json(record))
        assert read(tmp_path / name) == record
        assert next(iter(json.loads(to_json(record)))) == "schema_version"
    row = msgspec.convert(stored["samples.jsonl"][0], PairedRow)
    with pytest.raises(ValueError, match="Out of range|JSON compliant"):
        to_json(msgspec.structs.replace(row, score=float("nan")))
    with pytest.raises(ValueError, match="<= 1"):
        to_json(msgspec.structs.replace(row, score=2.0))


def test_a_folder_of_another_version_is_refused_by_its_version(tmp_path):
    run = write_run(tmp_path)
    content = json.loads((run / "results.json").read_text())
    for version in (0, 2, None, "1", 1.5):
        (run / "results.json").write_text(json.dumps(content | {"schema_version": version}))
        with pytest.raises(InputError, match=r"is of another version of the format"):
            read_run(run)
    del content["schema_version"]
    content["overall"]["retained"] = float("nan")  # as they were written before there were versions
    (run / "results.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"another version of the format \(0, and this is 1\)"):
        read_run(run)


ROWS = {
    "another task's name": ({"task": "ocr"}, "no question of task"),
    "another number": ({"id": "exist/x"}, "no question of task"),
    "NaN": ({"score": float("nan")}, "damaged"),
    "null": ({"score": None}, "damaged"),
    "a score above 1": ({"score": 7.0}, "damaged"),
    "another score": ({"score": 0.5}, "not those of results.json"),
    "a token that is not there": ({"kept": [[576]]}, "outside the 576"),
    "fewer images": ({"images": 0}, "entries for 0 images"),
    "an unknown key": ({"extra": 1}, "unknown field"),
    "a negative time": ({"time_ms": {"vision": -1}}, "damaged"),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_are_checked(tmp_path, name):
    changes, message = ROWS[name]
    run = write_run(tmp_path)
    log = run / "samples.jsonl"
    first, *others = log.read_text().splitlines(keepends=True)
    log.write_text(json.dumps(json.loads(first) | changes) + "\n" + "".join(others))
    with pytest.raises(InputError, match=message) as error:
        read_run(run)
    assert str(log) in str(error.value)


def test_a_row_that_is_there_twice_counts_once_and_two_that_differ_are_refused(tmp_path):
    run = write_run(tmp_path)
    log, before = run / "samples.jsonl", read_run(run)
    first, *others = log.read_text().splitlines(keepends=True)
    log.write_text(first + "".join(others) + first)
    assert read_run(run) == before
    log.write_text(
        first + "".join(others) + json.dumps(json.loads(first) | {"prediction": "other"}) + "\n"
    )
    with pytest.raises(InputError, match="two rows of question exist/000000"):
        read_run(run)


def config(run, **changes):
    found = json.loads((run / "results.json").read_text())["config"]
    return msgspec.convert(found | changes, RunConfig)


def test_a_summary_needs_no_model(tmp_path):
    run = write_run(tmp_path, per_task=4)
    results, rows = read_run(run)
    machine = Machine(device="test", peak_memory_bytes=1, tokens_per_image=576)
    found = summarize(results.config, rows, machine)
    assert {name: task.accuracy for name, task in found.tasks.items()} == {
        name: task.accuracy for name, task in results.tasks.items()
    }
    assert found.tokens.full == 576 and found.flops.baseline == pytest.approx(2e9)
    assert found.time_ms.prefill == 2 and found.overall.retained == pytest.approx(0.5)
    several = msgspec.structs.replace(machine, tokens_per_image=None)
    assert not summarize(results.config, rows, several).fixed_size


def test_a_folder_belongs_to_one_command(tmp_path):
    run = write_run(tmp_path)
    check_kind(run, "eval")
    for kind in ("compare", "suite", "search"):
        with pytest.raises(InputError, match="holds a run of eval; give another --output"):
            check_kind(run, kind)


def test_a_run_that_is_refused_leaves_no_configuration(tmp_path):
    fresh = tmp_path / "fresh"
    wanted = config(write_run(tmp_path / "run"))
    with RunFolder(fresh, wanted, PairedRow):
        assert fresh.is_dir()
    assert not fresh.exists()
    with RunFolder(tmp_path / "run", wanted, PairedRow) as folder:
        assert len(folder.rows) == 12
        assert np.mean(folder.scores()["exist"]) == 0.5
    for changes in ({"seed": 1}, {"limit": 3}, {"model": "other"}):
        (name,) = changes
        with pytest.raises(InputError, match=f"holds a run with another {name};"):
            RunFolder(tmp_path / "run", config(tmp_path / "run", **changes), PairedRow)
    other = Variant("fopru", 65)
    with pytest.raises(InputError, match="another budget;"):
        RunFolder(tmp_path / "run", config(tmp_path / "run", variant=other), PairedRow)


def test_weights_that_changed_under_their_name_are_another_run(tmp_path):
    model, adapter = tmp_path / "model", tmp_path / "adapter"
    for folder in (model, adapter):
        folder.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    files = {
        "checkpoint": model / "model.safetensors",
        "peft_digest": adapter / WEIGHTS,
        "calibration": tmp_path / "sale.safetensors",
    }
    for file in files.values():
        file.write_bytes(b"one")
    variant = Variant(
        "none+sale", 1.0, arguments={"attention.calibration": str(files["calibration"])}
    )
    wanted = config(
        write_run(tmp_path / "source"), model=str(model), peft=str(adapter), variant=variant
    )
    with RunFolder(tmp_path / "run", wanted, PairedRow) as folder:
        folder.record()
    for name, file in files.items():
        RunFolder(tmp_path / "run", wanted, PairedRow).folder.release()
        about = file.stat()
        file.write_bytes(b"other")
        with pytest.raises(InputError, match=f"holds a run with another {name};"):
            RunFolder(tmp_path / "run", wanted, PairedRow)
        file.write_bytes(b"one")
        os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))


def test_evaluation_records_have_no_untyped_parts():
    for module in (records,):
        tree = ast.parse(Path(module.__file__).read_text())
        assert not [node for node in ast.walk(tree) if getattr(node, "id", "") == "Any"]
    for kind in (Results, SuiteResults, PairedRow, FolderRecord, SearchResults):
        msgspec.json.schema(kind)  # fails on a type that cannot be checked
    for path in (ROOT / "benchmarks" / "evaluation").glob("*.py"):
        assert "list[dict[str, Any]]" not in path.read_text().replace("messages: list", ""), path


def test_rows_are_read_where_they_are_looked_up(tmp_path):
    """However many questions there are, no row is held."""
    source = read_rows(write_run(tmp_path / "source") / "samples.jsonl", PairedRow)
    wanted, first = config(tmp_path / "source"), next(iter(source.values()))
    with RunFolder(tmp_path / "run", wanted, PairedRow) as folder:
        for number in range(6):
            rows = [msgspec.structs.replace(first, id=f"exist/{number:06}", subset=str(number))]
            folder.append(rows)
            folder.append(rows)  # counts once
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        for number in range(6, 406):
            folder.append([msgspec.structs.replace(first, id=f"exist/{number:06}")])
        alive = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
        # the name and the place of a row, not what stands in it
        assert alive < 400 * 300 < 400 * len(folder.log.read_bytes()) / len(folder.rows)
        assert list(folder.rows) == [f"exist/{number:06}" for number in range(406)]
        assert folder.rows["exist/000004"].subset == "4"
        part = folder.rows.read("exist/000004", MeasuredRow)
        assert (part.score, part.time_ms) == (first.score, first.time_ms)
    with RunFolder(tmp_path / "run", wanted, PairedRow) as folder:
        assert len(folder.rows) == 406 and folder.rows["exist/000405"].id == "exist/000405"
