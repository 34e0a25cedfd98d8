"""Readers of people's data say in one line what is wrong with damaged files, whatever the damage."""

import copy
import io
import json

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, features
from pyarrow import parquet

from vlm_prune.benchmarks.batch.inputs import decode, find_images, input_root
from vlm_prune.benchmarks.experiments.iit import evaluate as iit
from vlm_prune.benchmarks.experiments.iit.sources import read_source
from vlm_prune.continual.streams import csv_manifest, read_coop_split
from vlm_prune.learners.data import read_llava
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.images import open_image
from vlm_prune.vlm.common.paths import DataRoot

ODD = [
    None, True, 0, -1, 1e300, float("nan"), float("inf"), "", "x", "\ud800", "a\0b", "../a.png", "/etc/passwd",
    "http://127.0.0.1:9/a", [], {}, [[[]]], {"a": {"b": []}}, "x" * 300, ["a.png", 3], 2**70,
]  # fmt: skip
TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
TALK = {"question": "?", "options": ["a", "b"], "answer": "A", "image": "a.png"}
CASES = {
    "llava": ("data.json", [{"id": "1", "image": "a.png", "conversations": TURNS}]),
    "iit": ("iit.jsonl", {"id": "V/0", "setting": "V", "turns": [TALK]}),
    "coop": ("split.json", {part: [["a.png", 0, "dog"]] for part in ("train", "val", "test")}),
    "mmlu": ("mmlu.jsonl", {"question": "?", "subject": "x", "choices": ["a", "b"], "answer": 1}),
    "hellaswag": (
        "h.jsonl",
        {"ctx": "?", "activity_label": "x", "endings": ["a", "b"], "label": "0"},
    ),
}
READERS = {
    "llava": lambda path: read_llava(path, path.parent),
    "iit": lambda path: iit.read_conversations(path.parent),
    "coop": lambda path: read_coop_split(path, path.parent, "mine", ("{}",)),
    "mmlu": lambda path: read_source("mmlu", str(path)),
    "hellaswag": lambda path: read_source("hellaswag", str(path)),
}


def places(value, at=()):
    """Every place in a JSON value, from the whole of it to its leaves."""
    yield at
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, part in items:
        yield from places(part, (*at, key))


def changed(value, at, new):
    """The value with something else, or nothing, at a place."""
    if not at:
        return new
    whole = copy.deepcopy(value)
    part = whole
    for key in at[:-1]:
        part = part[key]
    if new is places:
        del part[at[-1]]
    else:
        part[at[-1]] = new
    return whole


def read(reader, path):
    """Reads, or says in one line why not."""
    try:
        reader(path)
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 1500


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    return tmp_path


@pytest.mark.parametrize("name", CASES)
def test_json_of_any_shape_is_read_or_refused(name, folder):
    file, content = CASES[name]
    READERS[name](write(folder / file, json.dumps(content)))
    for at in places(content):
        for new in [*ODD, *([places] if at else [])]:
            text = json.dumps(changed(content, at, new))
            read(READERS[name], write(folder / file, text))
    text = json.dumps(content)
    for cut in range(0, len(text), 3):
        read(READERS[name], write(folder / file, text[:cut]))
    for whole in ("[" * 100_000, '{"a":' * 50_000, "null", "[]", "{}", "\ufeff" + text, "1e999"):
        read(READERS[name], write(folder / file, whole))


def write(path, text):
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    return path


@pytest.mark.parametrize("reader", ["manifest", "map"])
def test_tables_of_any_content_are_read_or_refused(reader, folder):
    text = "path,class,split,prompt\na.png,dog,train,red?\na.png,cat,test,\n"
    readers = {
        "manifest": lambda path: csv_manifest(path, "mine"),
        "map": lambda path: list(decode(find_images(path, "what?"), input_root(path))),
    }
    content = text.encode()
    draw = np.random.default_rng(0)
    readers[reader](write(folder / "list.csv", text))
    for _ in range(150):
        damaged = bytearray(content)
        for place in draw.integers(0, len(content), draw.integers(1, 6)):
            damaged[place] = draw.choice([0, 10, 34, 44, 255, 195, 13, 97])
        (folder / "list.csv").write_bytes(bytes(damaged[: draw.integers(1, len(content) + 1)]))
        read(readers[reader], folder / "list.csv")
    for odd in ODD:
        value = odd if isinstance(odd, str | None) and odd != "\ud800" else str(type(odd))
        rows = pa.table({"path": ["a.png", value], "prompt": [value, "?"]})
        parquet.write_table(rows, folder / "list.parquet")
        if reader == "map":
            read(readers[reader], folder / "list.parquet")


FORMATS = [
    ("PNG", {}), ("JPEG", {}), ("GIF", {}), ("BMP", {}), ("TIFF", {}), ("WEBP", {}), ("PPM", {}),
    ("TIFF", {"compression": "tiff_lzw"}), ("JPEG2000", {}), ("ICO", {}), ("TGA", {}), ("DDS", {}),
]  # fmt: skip


@pytest.mark.parametrize(("suffix", "options"), FORMATS, ids=lambda value: str(value))
def test_damaged_pictures_are_opened_or_refused(suffix, options, folder):
    """A picture that opens is whole RGB; what cannot be opened is one line."""
    if suffix == "JPEG2000" and not features.check("jpg_2000"):
        pytest.skip("Pillow lacks JPEG 2000")
    draw = np.random.default_rng(0)
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    picture = Image.fromarray(draw.integers(0, 256, (24, 16, 3), np.uint8))
    more = {"exif": exif} if suffix in ("PNG", "JPEG", "WEBP", "TIFF") else {}
    picture.save(file, suffix, **options, **more)
    content = file.getvalue()
    assert open_image(io.BytesIO(content)).mode == "RGB"
    for _ in range(120):
        damaged = bytearray(content[: draw.integers(1, len(content) + 1)])
        for place in draw.integers(0, min(len(damaged), 400), draw.integers(0, 5)):
            damaged[place] = draw.integers(256)
        try:
            assert open_image(io.BytesIO(bytes(damaged))).mode == "RGB"
        except InputError as error:
            assert "\n" not in str(error)


def test_rows_of_any_shape_are_read_or_refused(folder):
    pytest.importorskip("lmms_eval")
    from vlm_prune.benchmarks.lmms_eval.local import load_split

    row = {"id": "1", "question": "?", "answer": ["a"], "image": "a.png"}
    for kind in ("json", "jsonl"):
        for at in places(row):
            for new in [*ODD, *([places] if at else [])]:
                rows = [changed(row, at, new), row]
                text = json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows))
                write(folder / f"test.{kind}", text)
                read(lambda path: list(load_split(DataRoot(path), None, "test")), folder)
        (folder / f"test.{kind}").unlink()
