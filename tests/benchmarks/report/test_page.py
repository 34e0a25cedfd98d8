"""The page as text: hostile answers, missing parts, wrong input."""

import base64
import hashlib
import json
import re

import pytest

from vlm_prune.benchmarks.report import render_page
from vlm_prune.benchmarks.report.load import load_runs
from vlm_prune.benchmarks.tasks import TASKS
from vlm_prune.vlm.common.errors import InputError

HOSTILE = "</script><img src=x onerror=alert(1)>{{ 7 * 7 }}'\"&"


def data_of(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_hostile_strings_stay_text(make_run, edit, tmp_path):
    make_run(tmp_path, prediction=HOSTILE, baseline=HOSTILE)

    def change(results):
        results["model"] = results["command"] = results["versions"]["torch"] = HOSTILE
        results["config"]["model"] = HOSTILE
        results["config"]["variant"]["arguments"] = {"strategy": HOSTILE}

    edit(tmp_path / "results.json", change)
    page = render_page(load_runs([tmp_path]))
    assert "<img" not in page and page.count("</script>") == 2
    assert {answer["text"] for s in data_of(page)["samples"] for answer in s["answers"]} == {
        HOSTILE
    }


def test_the_policy_names_the_one_script_and_nothing_is_loaded(make_run, tmp_path):
    page = render_page(load_runs([make_run(tmp_path)]))
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page and "default-src 'none'" in page
    assert not re.search(r"(?:src|href)=[\"']?[^\"'#]", page) and "http:" not in page


def test_kept_places_become_bits_and_pictures_are_stored_once(make_run, tmp_path):
    for method in ("fopru", "zoo"):
        make_run(tmp_path / method, method, kept=[[0, 9, 575]])
    content = data_of(render_page(load_runs([tmp_path])))
    bits = base64.b64decode(content["samples"][0]["answers"][1]["kept"][0])
    assert [n for n in range(576) if bits[n >> 3] >> (7 - n % 8) & 1] == [0, 9, 575]
    assert len(content["images"]) == len(content["samples"]) == 12
    assert content["images"][0].startswith("data:image/jpeg;base64,")


def test_each_image_has_its_own_grid(make_run, tmp_path):
    seen = {
        "kept": [[0, 7, 23], [1]],
        "image_tokens": [24, 30],
        "grids": [[4, 6], None],
        "images": 2,
    }
    page = render_page(load_runs([make_run(tmp_path, **seen)]))
    sample = data_of(page)["samples"][0]
    bits, whole = sample["answers"][0]["kept"]
    assert sample["grids"] == [[4, 6], None] and whole is None
    assert base64.b64decode(bits) == bytes([0b10000001, 0, 0b00000001])
    assert "are shown whole" in page


def test_frames_of_a_video_have_grids_of_their_own(make_run, tmp_path):
    """Of frames that are encoded in pairs each pair's first one is drawn; a newline is none of one."""
    seen = {"grids": [None], "image_tokens": [97], "kept": [[0, 13, 95, 96]], "cropped": False}
    video = {"video_grids": [[16, 2, 3]]} | seen
    data = data_of(render_page(load_runs([make_run(tmp_path / "a", tasks=("appears",), **video)])))
    sample = data["samples"][0]
    assert sample["grids"] == [[2, 3]] * 16 and len(sample["images"]) == 16
    bits = [base64.b64decode(own)[0] for own in sample["answers"][0]["kept"]]
    assert bits == [0b10000000, 0, 0b01000000, *[0] * 12, 0b00000100]
    pairs = {"video_grids": [[8, 2, 3]], "image_tokens": [48], "kept": [[47]], "grids": [None]}
    content = data_of(
        render_page(load_runs([make_run(tmp_path / "b", tasks=("appears",), **pairs)]))
    )
    assert [data["images"][n] for n in sample["images"][::2]] == [
        content["images"][n] for n in content["samples"][0]["images"]
    ]
    wrong = {"video_grids": [[16, 3, 3]]} | seen
    with pytest.raises(InputError, match="frames of .* for the 97 tokens of a video"):
        load_runs([make_run(tmp_path / "c", tasks=("appears",), **wrong)])


def test_gallery_is_as_large_as_asked(make_run, tmp_path):
    runs = load_runs([make_run(tmp_path)])
    assert len(data_of(render_page(runs, 5))["samples"]) == 5
    assert data_of(render_page(runs, 0))["images"] == []


def test_text_only_runs_have_no_gallery(make_run, tmp_path):
    assert TASKS["text"].visual is False
    shown = {key: [] for key in ("kept", "image_tokens", "grids")} | {"images": 0}
    page = render_page(load_runs([make_run(tmp_path, tasks=("text",), **shown)]))
    assert "No pictures" in page and data_of(page)["samples"] == []


def test_report_of_a_real_run(run, checkpoint, tmp_path):
    out = tmp_path / "runs"
    arguments = ["--model", checkpoint, "--tasks", "exist,iit", "--limit", "4"]
    code, _, err = run("compare", *arguments, "--method", "fopru,adaptinfer,downsample", "--budget",
                       "0.05,64", "--output", out)  # fmt: skip
    assert code == 0, err
    code, text, err = run("report", out)
    assert code == 0 and str(out / "report.html") in text, err
    content = data_of((out / "report.html").read_text())
    assert content["budgets"] == ["29 tokens (0.05)", "64 tokens"]
    assert content["methods"] == ["adaptinfer", "fopru", "downsample"]
    assert all(
        kept for sample in content["samples"] for a in sample["answers"] for kept in a["kept"]
    )


def suite(folder):
    (folder / "config.json").write_text('{"schema_version": 1, "kind": "suite"}')
    return folder


WRONG = {
    "no folder": (lambda f: ["/nowhere"], "is no folder"),
    "file": (lambda f: [f / "results.json"], "is no folder"),
    "empty": (lambda f: [f / "empty"], "holds no run"),
    "suite": (lambda f: [suite(f / "empty")], "holds a suite"),
    "unfinished": (lambda f: (f / "results.json").unlink(), "unfinished"),
    "no rows": (lambda f: (f / "samples.jsonl").unlink(), "cannot read"),
    "not JSON": (lambda f: (f / "results.json").write_text('{"a": '), "as JSON"),
    "other JSON": (lambda f: (f / "results.json").write_text("[]"), "a JSON object is expected"),
    "half a row": (lambda f: (f / "samples.jsonl").write_text('{"id"'), "is damaged"),
    "not text": (lambda f: (f / "samples.jsonl").write_bytes(b"\xff\xfe\xfd"), "is damaged"),
    "fewer rows": (lambda f: (f / "samples.jsonl").write_text(""), "has 0 rows of task exist"),
    "other keys": (lambda f: (f / "results.json").write_text('{"model": "x"}'), "another version"),
    "directory": (lambda f: [f, "--output", f / "empty"], "is a folder"),
    "below a file": (lambda f: [f, "--output", f / "config.json" / "a.html"], "not a folder"),
    "nothing": (lambda f: [], "Missing argument"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_one_line(run, make_run, tmp_path, name):
    spoil, message = WRONG[name]
    folder = make_run(tmp_path / "run")
    (folder / "empty").mkdir()
    arguments = spoil(folder)
    code, out, err = run("report", *(arguments if isinstance(arguments, list) else [folder]))
    assert code == 2 and message in err and not out
    assert len(err.strip().splitlines()) == 1 and "Traceback" not in err
    assert not list(tmp_path.rglob("*.html*"))


def test_questions_of_another_version_are_refused(run, make_run, tmp_path):
    make_run(tmp_path, question="Who are you?")
    code, _, err = run("report", tmp_path)
    assert code == 2 and "not the one that this version makes" in err
    assert run("report", tmp_path, "--gallery", "0")[0] == 0


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("seed", 1, "differ in seed"),
        ("variant", None, "both hold fopru"),
        ("kept", [[576]], "outside"),
        ("grids", [[23, 24]], "a grid of (23, 24) for the 576"),
    ],
)
def test_runs_that_cannot_stand_together(run, make_run, edit, tmp_path, key, value, message):
    rows = {key: value} if key in ("kept", "grids") else {}
    make_run(tmp_path / "a"), make_run(tmp_path / "b", **rows)
    if key == "seed":
        edit(tmp_path / "b" / "results.json", lambda results: results["config"].update(seed=value))
        edit(tmp_path / "b" / "results.json", lambda results: results.update(seed=value))
    code, _, err = run("report", tmp_path / "a", tmp_path / "b")
    assert code == 2 and message in err
