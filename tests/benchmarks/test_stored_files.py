"""Each file that an experiment or lmms-eval goes on with is read typed: damage is one line, nothing else."""

import json
from pathlib import Path

import msgspec
import pytest
from PIL import Image

from vlm_prune.benchmarks.experiments.continual.experiment import (
    CANDIDATES,
    read_report,
    read_search,
    read_step_ms,
)
from vlm_prune.benchmarks.experiments.forgetting.experiment import _finished
from vlm_prune.benchmarks.experiments.forgetting.records import ForgettingResults
from vlm_prune.benchmarks.experiments.iit.evaluate import read_conversations
from vlm_prune.benchmarks.speed.attention import AttentionResults
from vlm_prune.benchmarks.speed.bench import BenchResults
from vlm_prune.benchmarks.speed.serving import ServingResults
from vlm_prune.benchmarks.speed.wings_cost import WingsResults
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.records import read_record, to_json

ROOT = Path(__file__).parents[2]

REPORT = {
    "recipe": {"lr": 0.001},
    "retention": {"scenes": {"before": 0.5, "after": 0.25, "difference": -0.25, "ci": [-0.5, 0.0]}},
    "trainable_parameters": [10, 10], "added_parameters": [0, 0], "update_norms": [0.5, 0.25],
    "drift": [0.5, 1.0],
}  # fmt: skip
SEARCH = {"lora": [one | {"average": 0.5} for one in CANDIDATES["lora"][:2]]}
CURVES = [[0.5, 0.25], [0.5, 0.25], [0.5, 0.25]]
ARM = {
    "hits": {part: {"exist": [[1, 2], [2, 2]]} for part in ("text", "visual", "iit")},
    "curves": {"with first token": CURVES, "without first token": CURVES},
    "shift": {"with first token": [0.5], "without first token": [0.25]},
    "cost": {"trainable": 1, "step_s": 0.5, "memory_bytes": 7},
}  # fmt: skip
TURN = {"question": "What?", "options": ["a", "b"], "answer": "A", "image": "a.png"}
TALK = {"id": "V/0000", "setting": "V", "turns": [TURN]}
ANSWER = {
    "id": "pope/000001", "question": "Is there a star?", "question_hash": "0a", "reply": "yes",
    "images": 1, "image_tokens": [4], "cropped": False, "grids": [[2, 2]], "text_tokens": 3,
    "vision_flops": 7.0, "layer_tokens": [4.0], "kept": [[0, 3]], "input_tokens": 7, "output_tokens": 1,
    "time_ms": {"vision": 1.0, "selection": 1.0, "prefill": 1.0, "decode": 1.0},
}  # fmt: skip


def read_answers(folder):
    from vlm_prune.benchmarks.lmms_eval.answers import Answers

    return Answers(folder / "pope", {"model": "tiny"}).rows


def read_arm(folder):
    return _finished(None, folder, 0, "lora")


READERS = {
    "report": ("report.json", REPORT, read_report),
    "search": ("search.json", SEARCH, read_search),
    "step_ms": ("step_ms.json", {"lora": 7.5, "codyra": 8.0}, read_step_ms),
    "arm": ("seed-0/lora.json", ARM, read_arm),
    "conversations": ("iit.jsonl", TALK, read_conversations),
    "answers": ("pope/answers.jsonl", ANSWER, read_answers),
}
TEXTS = (
    "null", "7", "[7]", '"x"', "{", "[" * 100_000, '{"a":' * 50_000, "NaN", "1e999", "\xff", "Infinity",
    '{"schema_version": 7}', '{"lora": null}', '{"lora": "1"}', '{"lora": 1e999}', '{"lora": -1}',
)  # fmt: skip
VALUES = (None, "1", -1, 1e300, [], [[]], {}, {"": None}, True, "../x")


def leaves(content, path=()):
    """The paths of all values inside a JSON value, containers included."""
    children = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in children:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from leaves(value, (*path, key))


def replaced(content, path, value):
    changed = json.loads(json.dumps(content))
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return changed


@pytest.fixture(params=READERS)
def stored(request, tmp_path):
    """Writes a reader's file and reads it."""
    file, content, reader = READERS[request.param]
    if request.param == "answers":
        pytest.importorskip("lmms_eval", reason="lmms-eval is not installed")
        read_answers(tmp_path)  # notes whose answers they are
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)

    def write_and_read(text):
        path.write_bytes(f"{text}\n".encode("latin-1"))
        return reader(tmp_path)

    return content, write_and_read


def refused(error, name):
    message = str(error.value)
    assert "\n" not in message and "Error" not in message and len(message) < 500, (name, message)


def test_sound_files_are_read(stored):
    content, write_and_read = stored
    assert write_and_read(json.dumps(content))


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:24])
def test_what_is_no_such_record_is_refused(stored, text):
    _, write_and_read = stored
    with pytest.raises(InputError) as error:
        write_and_read(text)
    refused(error, text)


def test_a_number_is_no_text_and_a_record_is_whole(stored):
    """Every value of a sound file, replaced by others: refused in a line, or what its type allows."""
    content, write_and_read = stored
    taken = []
    for path in leaves(content):
        for value in VALUES:
            text = json.dumps(replaced(content, path, value))
            try:
                write_and_read(text)
            except InputError as error:
                assert "\n" not in str(error)
            else:
                taken.append((path, value))
    # what a type allows may stand there: a text for a text, a number in range for a number
    for path, value in taken:
        inner = content
        for key in path:
            inner = inner[key]
        own = int | float if isinstance(inner, int | float) else type(inner)
        assert value is None or isinstance(value, own), (path, value)
        assert not isinstance(value, bool) or isinstance(inner, bool), (path, value)


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "Infinity"])
def test_numbers_are_finite(stored, number):
    content, write_and_read = stored
    for path in leaves(content):
        inner = content
        for key in path:
            inner = inner[key]
        if isinstance(inner, float):
            text = json.dumps(replaced(content, path, "HERE")).replace('"HERE"', number)
            with pytest.raises(InputError):
                write_and_read(text)


def test_answers_are_their_own_tasks_and_their_own_runs(tmp_path):
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed")
    from vlm_prune.benchmarks.lmms_eval.answers import Answers, StoredAnswer

    assert read_answers(tmp_path) == {}
    rows = Answers(tmp_path / "pope", {"model": "tiny"})
    rows.append([msgspec.convert(ANSWER, StoredAnswer)])
    assert read_answers(tmp_path).keys() == {"pope/000001"}
    with pytest.raises(InputError, match="another model"):
        Answers(tmp_path / "pope", {"model": "other"})
    rows.append([msgspec.convert(ANSWER | {"id": "gqa/000001"}, StoredAnswer)])
    with pytest.raises(InputError, match="line 2 of .* answers 'gqa/000001', another task's"):
        read_answers(tmp_path)
    (tmp_path / "pope" / "about.json").write_text("{")
    with pytest.raises(InputError, match="about.json is damaged"):
        read_answers(tmp_path)


MEASURED = {
    "cpu/bench": list[BenchResults], "cpu/serving": dict[str, ServingResults],
    "cpu/wings-7b": WingsResults, "cpu/sparse-short": AttentionResults,
    "forgetting/forgetting": ForgettingResults,
}  # fmt: skip


@pytest.mark.parametrize("name", MEASURED)
def test_results_of_before_versions_are_read_and_those_of_other_versions_refused(name, tmp_path):
    path, kind = ROOT / f"docs/results/{name}.json", MEASURED[name]
    content = json.loads(to_json(read_record(path, kind, "measure again")))
    first = next(iter(content.values())) if name == "cpu/serving" else content
    first = first[0] if isinstance(first, list) else first
    assert first.pop("schema_version") == 1
    for version in ({}, {"schema_version": 2}):
        first |= version
        (tmp_path / "copy.json").write_text(json.dumps(content))
        if not version:
            read_record(tmp_path / "copy.json", kind, "measure again")
    with pytest.raises(InputError, match="is damaged .Invalid value 2 .*; measure again"):
        read_record(tmp_path / "copy.json", kind, "measure again")
