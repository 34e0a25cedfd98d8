"""What rows of data sets say stays what it is, and what they name is a file of the data set."""

import io
import json
import socket
from collections import Counter

import datasets
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet as pq

from vlm_prune.benchmarks.evaluation.engine import samples_of
from vlm_prune.benchmarks.evaluation.records import RunConfig, Variant
from vlm_prune.benchmarks.lmms_eval.chat import conversation
from vlm_prune.benchmarks.lmms_eval.load import load_task
from vlm_prune.benchmarks.lmms_eval.local import load_split
from vlm_prune.benchmarks.lmms_eval.rows import dataset_of_rows, whole_groups
from vlm_prune.benchmarks.lmms_eval.run import leaves_of
from vlm_prune.benchmarks.lmms_eval.shown import images_of
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.images import open_image
from vlm_prune.vlm.common.paths import DataRoot

MIXED = {
    "texts and numbers": ["007", 7, "null", "5", None, "1e3"],
    "numbers first": [7, "007"],
    "whole and broken numbers": [1, 1.5, 2],
    "large numbers": [2**70, 1],
    "truth and numbers": [True, 1, 0],
    "lists": [["007", 7], ["1"], []],
    "numbers in lists": [[1, 2.5], [3]],
    "objects": [{"x": "007"}, {"x": 7}],
    "anything": ["[1]", [1], {"a": None}, '{"a": null}', False],
    "texts": ["a", "null", "007", None, "2020-01-01", "é\u2028"],
    "not a number": [float("nan"), 1.0, float("inf")],
}


@pytest.mark.parametrize("name", MIXED)
def test_values_of_json_stay_what_the_file_says(name):
    values = MIXED[name]
    rows = dataset_of_rows([{"id": number, "value": value} for number, value in enumerate(values)])
    shuffled = rows.select(range(len(values))).filter(lambda row: row["id"] >= 0)
    for table in (rows, shuffled):
        found = [row["value"] for row in table]
        assert json.dumps(found) == json.dumps(values)
        assert [type(value) for value in found] == [type(value) for value in values]


def test_columns_that_only_later_rows_have_are_there():
    rows = dataset_of_rows(
        [{"id": "1"}, {"id": "2", "hint": "x"}, {"more": {"a": 1}}, {"more": {"b": "2"}}]
    )
    assert rows["hint"][:] == [None, "x", None, None]
    assert rows["more"][:] == [None, None, {"a": 1, "b": None}, {"a": None, "b": "2"}]


def pope(folder, *rows, lines=True):
    """POPE's questions with these values in place of theirs."""
    (folder / "POPE").mkdir(exist_ok=True)
    usual = {"question": "Is there a box?", "answer": "yes", "category": "adversarial"}
    content = [usual | {"id": str(n), "question_id": str(n)} | row for n, row in enumerate(rows)]
    if lines:
        text = "\ufeff" + "\n".join(json.dumps(row, ensure_ascii=False) for row in content)
    else:
        text = json.dumps(content)
    (folder / "POPE" / f"test.json{'l' * lines}").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("lines", [True, False])
def test_a_task_of_mixed_answers_is_asked_and_scored_by_them(run, checkpoint, tmp_path, lines):
    root = tmp_path / "root"
    root.mkdir()
    pope(
        root, {"question_id": 7, "image": "a.png"},
        {"question_id": "007", "question": "a\u2028b?", "image": "a.png"}, lines=lines,
    )  # fmt: skip
    Image.new("RGB", (60, 60)).save(root / "POPE" / "a.png")
    task = load_task("pope", root)
    assert [row["question_id"] for row in task.eval_docs] == [7, "007"]
    command = [
        "--model",
        checkpoint,
        "--tasks",
        "pope",
        "--data-root",
        root,
        "--output",
        tmp_path / "out",
    ]
    code, _, err = run("eval", *command, "--limit", "2", "--budget", "16")
    assert code == 0 and not err, err
    rows = [
        json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()
    ]
    assert [row["question"].split("\n")[0] for row in rows] == ["Is there a box?", "a\u2028b?"]


@pytest.fixture
def guarded(tmp_path, monkeypatch):
    """A root with an image in it and one beside it; whoever opens a connection fails."""
    (tmp_path / "root" / "POPE" / "in").mkdir(parents=True)
    Image.new("RGB", (60, 60), "red").save(tmp_path / "root" / "POPE" / "in" / "a.png")
    Image.new("RGB", (60, 60), "blue").save(tmp_path / "secret.png")
    (tmp_path / "root" / "POPE" / "link.png").symlink_to(tmp_path / "secret.png")

    def refuse(*_):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    return tmp_path / "root"


LEADING_OUT = ["../../secret.png", "link.png", "in/../../../secret.png"]
URLS = [
    "http://127.0.0.1:9/a.png",
    "https://example.org/a.png",
    "zip://a.png::http://127.0.0.1:9/b",
]


@pytest.mark.parametrize("name", [*LEADING_OUT, *URLS, "absolute"])
def test_json_names_files_of_the_data_set(guarded, name):
    path = str(guarded.parent / "secret.png") if name == "absolute" else name
    pope(guarded, {"image": "in/a.png"}, {"image": path})
    with pytest.raises(
        InputError, match="nothing is downloaded" if name in URLS else "leads out of"
    ):
        load_task("pope", guarded)
    allowed = DataRoot(guarded, allow_outside=True)
    if name in URLS:
        with pytest.raises(InputError, match="nothing is downloaded"):
            load_task("pope", allowed)
    else:
        assert load_task("pope", allowed).eval_docs[1]["image"].getpixel((0, 0)) == (0, 0, 255)


def parquet(folder, paths):
    """POPE as Parquet whose rows name their images."""
    columns = {name: ["yes"] * len(paths) for name in ("question", "answer", "category", "id")}
    image = pa.array(
        [{"bytes": None, "path": path} for path in paths],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    table = pa.table(columns | {"question_id": columns["id"], "image": image})
    names = ("question", "answer", "category", "id", "question_id")
    features = datasets.Features(
        {name: datasets.Value("string") for name in names} | {"image": datasets.Image()}
    )
    noted = features.arrow_schema.metadata
    pq.write_table(table.replace_schema_metadata(noted), folder / "POPE" / "test.parquet")


def test_parquet_names_files_of_the_data_set(guarded):
    paths = ["in/a.png", *LEADING_OUT, str(guarded.parent / "secret.png"), *URLS, ""]
    parquet(guarded, paths)
    task = load_task("pope", guarded)
    assert list(task.unreadable) == list(range(1, len(paths)))
    assert len(task.eval_docs) == 1
    assert task.eval_docs[0]["image"].getpixel((0, 0)) == (255, 0, 0)
    for number, message in task.unreadable.items():
        wanted = "nothing is downloaded" if paths[number] in URLS else "leads out|without content"
        assert any(part in message for part in wanted.split("|")), message
    allowed = load_task("pope", DataRoot(guarded, allow_outside=True))
    assert list(allowed.unreadable) == [n for n, path in enumerate(paths) if path in [*URLS, ""]]
    assert allowed.eval_docs[1]["image"].getpixel((0, 0)) == (0, 0, 255)


def test_data_files_and_folders_that_are_links_out_of_the_root_are_refused(guarded):
    (guarded / "POPE" / "test.parquet").symlink_to(guarded.parent / "secret.png")
    with pytest.raises(InputError, match="leads out of"):
        load_split(DataRoot(guarded).below("POPE"), None, "test")
    (guarded / "GQA").symlink_to(guarded.parent)
    with pytest.raises(InputError, match="leads out of"):
        load_task("gqa", guarded)


def test_rows_open_as_every_picture_does(tmp_path):
    """16 bits, floating point, transparency, EXIF: what a task shows is what `ask` would show."""
    exif = Image.Exif()
    exif[0x0112] = 6
    ramp = np.linspace(0, 65535, 48).round().astype(np.uint16).reshape(6, 8)
    rgba = np.zeros((6, 8, 4), np.uint8)
    rgba[:3, :, 3] = 255
    pictures = {
        "deep.png": (Image.fromarray(ramp), {}),
        "float.tiff": (Image.fromarray((ramp / 65535).astype(np.float32)), {}),
        "clear.png": (Image.fromarray(rgba), {}),
        "turned.jpg": (Image.fromarray(rgba[..., :3]), {"exif": exif}),
    }
    (tmp_path / "POPE").mkdir()
    contents = []
    for name, (image, options) in pictures.items():
        image.save(tmp_path / "POPE" / name, **options)
        contents.append((tmp_path / "POPE" / name).read_bytes())
    pope(tmp_path, *({"image": name} for name in pictures))
    table = datasets.Dataset.from_list(
        [{"image": {"bytes": content, "path": None}, "question": "?", "answer": "yes", "category": "",
          "question_id": "", "id": ""} for content in contents]
    ).cast_column("image", datasets.Image())  # fmt: skip
    (tmp_path / "packed" / "POPE").mkdir(parents=True)
    table.to_parquet(str(tmp_path / "packed" / "POPE" / "test.parquet"))
    for root in (tmp_path, tmp_path / "packed"):
        task = load_task("pope", root)
        for row, name in zip(task.eval_docs, pictures, strict=True):
            wanted = np.asarray(open_image(tmp_path / "POPE" / name))
            (shown,) = task.doc_to_visual(row)
            assert np.array_equal(np.asarray(shown), wanted), name


def test_pictures_that_the_model_does_not_take_are_named_and_the_others_asked(
    run, checkpoint, tmp_path
):
    root = pope(tmp_path, {"image": "thin.png"}, {"image": "a.png"})
    Image.new("RGB", (60, 60)).save(root / "POPE" / "a.png")
    Image.new("RGB", (60_000, 1)).save(root / "POPE" / "thin.png")
    code, _, err = run(
        "eval", "--model", checkpoint, "--tasks", "pope", "--data-root", root, "--limit", "2",
        "--budget", "16", "--output", tmp_path / "out",
    )  # fmt: skip
    assert code == 0
    assert (
        err.startswith("pope row 0 skipped: an image of 60000 x 1 becomes") and err.count("\n") == 1
    )
    assert json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]["pope"]["n"] == 1


def test_groups_are_taken_whole():
    keys = list("aabbcacb")
    assert whole_groups(keys, 8) == [0, 1, 5, 2, 3, 7, 4, 6]
    assert whole_groups(keys, 7) == whole_groups(keys, 6) == [0, 1, 5, 2, 3, 7]
    assert whole_groups(keys, 3) == [0, 1, 5]
    with pytest.raises(InputError, match="needs 3 rows at once, and the limit leaves it 2"):
        whole_groups(keys, 2)


def mme(folder, order):
    """Three pairs of questions in some order."""
    content = io.BytesIO()
    Image.new("RGB", (60, 60)).save(content, "PNG")
    rows = [
        {"question_id": f"color/{n // 2}.jpg", "image": {"bytes": content.getvalue(), "path": None},
         "question": f"Is it {n}? Please answer yes or no.", "answer": "No" if n % 2 else "Yes",
         "category": "color"}
        for n in order
    ]  # fmt: skip
    (folder / "MME").mkdir()
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    table.to_parquet(str(folder / "MME" / "test.parquet"))
    return folder


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [0, 2, 4, 1, 3, 5]])
def test_a_limit_splits_no_pair_of_mme(run, checkpoint, tmp_path, order):
    root = mme(tmp_path, order)
    command = [
        "eval",
        "--model",
        checkpoint,
        "--tasks",
        "mme",
        "--data-root",
        root,
        "--budget",
        "16",
    ]
    code, _, err = run(*command, "--limit", "3", "--output", tmp_path / "out")
    assert code == 0 and "skipped" not in err, err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["tasks"]["mme"]["n"] == 2
    assert "mme_perception_score,none" in results["tasks"]["mme"]["metrics"]
    code, _, err = run(*command, "--limit", "1")
    assert code == 2 and "needs 2 rows at once, and the limit leaves it 1; raise --limit" in err


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [0, 2, 4, 1, 3, 5]])
def test_pictures_of_pairs_are_found_by_their_numbers(tmp_path, order):
    root = mme(tmp_path, order)
    config = RunConfig("tiny", Variant("none", 1.0), ("mme",), 5)
    task = load_task("mme", root, limit=5)
    for number in (0, 3):
        question = conversation(task.doc_to_messages(task.eval_docs[number])).question
        (image,) = images_of("mme", {number: question}, root, config)[number]
        assert f"Is it {number}?" in question and image.size == (60, 60)


def test_an_embedded_task_has_as_many_questions_as_are_asked():
    assert [len(load_task("vlm_prune_exist", None, limit=n).eval_docs) for n in (600, 20)] == [
        600,
        20,
    ]
    assert len(load_task("vlm_prune_exist", None).eval_docs) == 500


def test_the_order_of_tasks_changes_no_share():
    """Names of groups and tags, of which some share tasks, and embedded tasks too."""
    names = ("mme", "pope", "mmlu_stem", "mmlu_astronomy", "exist")
    for limit in (5, 7, 60, 61):
        found, samples = [], []
        for tasks in (names, names[::-1], (*names[2:], *names[:2])):
            config = RunConfig("tiny", Variant("none", 1.0), tasks, limit)
            found.append({leaf.name: leaf.limit for leaf in leaves_of(config, {})})
            embedded = ("count", "exist", "ocr") if tasks is names else ("ocr", "exist", "count")
            samples.append(Counter(s.id for s in samples_of(embedded, limit, 0, "test")))
        assert found[0] == found[1] == found[2] and samples[0] == samples[1]
        assert sum(samples[0].values()) == limit
        assert found[0]["mme"] - found[0]["pope"] in (0, 1)


def test_rows_of_the_hub_open_alike_and_name_no_other_files(guarded, monkeypatch):
    content = io.BytesIO()
    Image.fromarray(np.full((8, 8), 65535 // 2, np.uint16)).save(content, "PNG")
    secret = str(guarded.parent / "secret.png")
    cells = [
        {"bytes": content.getvalue(), "path": "a.png"},
        *({"bytes": None, "path": path} for path in (secret, URLS[0])),
    ]
    columns = {
        name: ["yes"] * 3 for name in ("question", "answer", "category", "question_id", "id")
    }
    features = datasets.Features(
        {name: datasets.Value("string") for name in columns} | {"image": datasets.Image()}
    )
    table = datasets.Dataset.from_dict(columns | {"image": cells}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict(test=table))
    task = load_task("pope", None)
    (row,) = task.eval_docs
    assert row["image"].getpixel((0, 0)) == (127, 127, 127)
    leads_out, url = task.unreadable.values()
    assert "leads out of" in leads_out and "nothing is downloaded" in url
    assert len(load_task("pope", DataRoot(guarded / "POPE", allow_outside=True)).eval_docs) == 2
