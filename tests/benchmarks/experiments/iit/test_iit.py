"""The IIT reconstruction from small files in the formats of the eight public data sets."""

import base64
import csv
import io
import json
import zipfile
from collections import Counter

import pytest
from PIL import Image

from vlm_prune.benchmarks.experiments.iit.build import build_conversations, conversations, group_of
from vlm_prune.benchmarks.experiments.iit.evaluate import (
    evaluate_conversations,
    letter_of,
    read_conversations,
)
from vlm_prune.benchmarks.experiments.iit.files import image_bytes
from vlm_prune.benchmarks.experiments.iit.sources import SOURCES, read_source
from vlm_prune.benchmarks.tasks.iit import SETTINGS
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.paths import DataRoot

TOPICS = ("planets orbit the sun", "plants make sugar", "magnets attract iron", "ice melts")


def png(shade):
    stream = io.BytesIO()
    Image.new("RGB", (20, 20), (shade, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def question_text(n):
    return f"Question {n}: why do {TOPICS[n % len(TOPICS)]}?"


def answers(n):
    return [f"{letter} of {n}" for letter in "wxyz"]


def cell(n):
    return {"bytes": png(n), "path": None}


ROWS = {
    "mmlu": lambda n: {
        "question": question_text(n), "subject": "sociology", "choices": answers(n), "answer": n % 4,
    },
    "openbookqa": lambda n: {
        "id": str(n), "question_stem": question_text(n + 20),
        "choices": {"text": answers(n), "label": ["A", "B", "C", "D"]}, "answerKey": "ABCD"[n % 4],
    },
    "hellaswag": lambda n: {
        "ind": n, "activity_label": "Baking", "ctx_a": "", "ctx_b": "", "ctx": question_text(n + 40),
        "endings": answers(n), "source_id": "", "split": "val", "split_type": "indomain",
        "label": str(n % 4),
    },
    "mmmu": lambda n: {
        "id": f"validation_Sociology_{n}", "question": f"{question_text(n + 60)} <image 1>",
        "options": str(answers(n)), "explanation": "", "image_1": cell(n), "image_2": None,
        "img_type": "['Tables']", "answer": "ABCD"[n % 4], "topic_difficulty": "Easy",
        "question_type": "multiple-choice", "subfield": "Theory",
    },
    "mmbench": lambda n: {
        "index": n, "question": question_text(n + 80), "hint": "nan", "answer": "AB"[n % 2], "A": "yes",
        "B": "no", "C": "nan", "D": "nan", "category": "physical_property_reasoning",
        "image": cell(100 + n), "source": "x", "l2-category": "y", "comment": "nan", "split": "dev",
    },
    "seed": lambda n: {
        "answer": "ABCD"[n % 4], "choice_a": "p", "choice_b": "q", "choice_c": "r", "choice_d": "s",
        "data_id": str(n), "data_type": "image" if n else "video", "question": question_text(n + 100),
        "question_id": str(n), "question_type_id": 1, "image": [cell(150 + n)], "segment": None,
    },
    "ai2d": lambda n: {
        "question": question_text(n + 120), "options": answers(n), "answer": str(n % 4),
        "image": cell(200 + n),
    },
}  # fmt: skip
PLACES = {
    "mmlu": "all/test-0.parquet", "openbookqa": "main/test-0.parquet",
    "hellaswag": "data/validation-0.parquet", "mmmu": "data/validation-0.parquet",
    "mmbench": "en/dev-0.parquet", "seed": "data/test-0.parquet", "ai2d": "data/test-0.parquet",
}  # fmt: skip


def jsonl(folder, name, number=6):
    """A JSON-lines copy of a source, images beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for n in range(number):
        row = ROWS[name](n)
        for key, value in row.items():
            inner = value[0] if isinstance(value, list) else value
            if isinstance(inner, dict) and "bytes" in inner:
                (folder / f"{key}-{n}.png").write_bytes(inner["bytes"])
                row[key] = f"{key}-{n}.png"
        lines.append(json.dumps(row))
    path = folder / f"{name}-{'validation' if name in ('hellaswag', 'mmmu') else 'test'}.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def copies(tmp_path):
    """Local copies of all eight, as JSON lines, CMMLU as the CSV files it comes in."""
    found = {name: str(jsonl(tmp_path / name, name)) for name in ROWS}
    folder = tmp_path / "cmmlu" / "test"
    folder.mkdir(parents=True)
    rows = [f"{n},问题{n},甲,乙,丙,丁,{'ABCD'[n % 4]}" for n in range(6)]
    (folder / "sociology.csv").write_text("\n".join([",Question,A,B,C,D,Answer", *rows]))
    return found | {"cmmlu": str(tmp_path / "cmmlu")}


def test_every_source_is_read_from_its_own_format(copies):
    for name in SOURCES:
        items = read_source(name, copies[name])
        assert len(items) == (5 if name == "seed" else 6)  # one row of seed is a video
        assert all(item.answer in "ABCD" and len(item.options) >= 2 for item in items)
        assert {item.visual for item in items} == {SOURCES[name].visual}
    assert group_of(read_source("mmmu", copies["mmmu"])[0].subject) == "society"
    assert group_of(read_source("cmmlu", copies["cmmlu"])[0].subject) == "society"


@pytest.mark.parametrize("name", PLACES)
def test_parquet_copies_give_the_same_questions(name, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    path = tmp_path / "copy" / PLACES[name]
    path.parent.mkdir(parents=True)
    write_table(pyarrow.Table.from_pylist([ROWS[name](n) for n in range(6)]), path)
    lines = read_source(name, str(jsonl(tmp_path / "lines", name)))
    tables = read_source(name, str(tmp_path / "copy"))
    assert [(i.subject, i.question, i.options, i.answer) for i in tables] == [
        (i.subject, i.question, i.options, i.answer) for i in lines
    ]
    text = {"mmlu": str(jsonl(tmp_path / "text", "mmlu"))}
    if SOURCES[name].visual:
        build_conversations(tmp_path / "out", text | {name: str(tmp_path / "copy")}, size=2)
        assert {
            sample.images[0].size
            for sample in read_conversations(tmp_path / "out")
            if sample.images
        } == {(20, 20)}


def test_the_files_that_authors_publish_are_read(copies, tmp_path):
    """CMMLU's zip, MMBench's TSV, OpenbookQA's JSON lines: the same questions as other copies."""
    with zipfile.ZipFile(tmp_path / "cmmlu.zip", "w") as archive:
        table = tmp_path / "cmmlu" / "test" / "sociology.csv"
        archive.write(table, "test/sociology.csv")
        archive.writestr("dev/sociology.csv", ",Question,A,B,C,D,Answer\n0,?,a,b,c,d,A\n")
    rows = [ROWS["mmbench"](n) for n in range(6)]
    for row in rows:
        row["image"] = base64.b64encode(row["image"]["bytes"]).decode()
    with (tmp_path / "MMBench_DEV_EN.tsv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    lines = []
    for n in range(6):
        row = ROWS["openbookqa"](n)
        choices = [
            {"text": text, "label": label}
            for text, label in zip(row["choices"]["text"], row["choices"]["label"], strict=True)
        ]
        question = {"stem": row["question_stem"], "choices": choices}
        lines.append({"id": row["id"], "question": question, "answerKey": row["answerKey"]})
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, lines)))
    published = {"cmmlu": "cmmlu.zip", "mmbench": "MMBench_DEV_EN.tsv", "openbookqa": "test.jsonl"}
    for name, file in published.items():
        theirs, ours = read_source(name, str(tmp_path / file)), read_source(name, copies[name])
        assert [(i.question, i.options, i.answer) for i in theirs] == [
            (i.question, i.options, i.answer) for i in ours
        ], name
    sources = {"mmlu": copies["mmlu"], "mmbench": str(tmp_path / "MMBench_DEV_EN.tsv")}
    build_conversations(tmp_path / "out", sources, size=2)
    assert any(sample.images for sample in read_conversations(tmp_path / "out"))


def test_images_may_be_base64(copies, tmp_path):
    rows = [ROWS["mmbench"](n) for n in range(3)]
    path = tmp_path / "dev.jsonl"
    encoded = [row | {"image": base64.b64encode(row["image"]["bytes"]).decode()} for row in rows]
    path.write_text("\n".join(map(json.dumps, encoded)))
    build_conversations(tmp_path / "out", {"mmlu": copies["mmlu"], "mmbench": str(path)}, size=2)
    assert any(sample.images for sample in read_conversations(tmp_path / "out"))


def test_settings_have_their_turns_and_neighbors_are_near(copies, tmp_path):
    counts = build_conversations(tmp_path / "out", copies, size=8, seed=1)
    assert counts == dict.fromkeys(SETTINGS, 8)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert "reconstruction" in manifest["label"] and manifest["seed"] == 1
    lines = [json.loads(line) for line in (tmp_path / "out" / "iit.jsonl").read_text().splitlines()]
    for line in lines:
        kinds = ["V" if turn["image"] else "T" for turn in line["turns"]]
        assert ",".join(kinds) == line["setting"]
        assert len({turn["question"] for turn in line["turns"]}) == len(kinds)
    last = Counter(line["turns"][-1]["source"] for line in lines if line["setting"] == "V")
    assert last == {"mmmu": 2, "mmbench": 2, "seed": 2, "ai2d": 2}
    near = [
        line["turns"][0]["source"]
        for line in lines
        if line["setting"] == "T,V" and line["turns"][-1]["source"] == "mmmu"
    ]
    assert set(near) <= {"mmlu", "cmmlu"}  # sociology, as the question that they precede
    build_conversations(tmp_path / "again", copies, size=8, seed=1)
    build_conversations(tmp_path / "other", copies, size=8, seed=2)
    texts = [(tmp_path / n / "iit.jsonl").read_text() for n in ("out", "again", "other")]
    assert texts[0] == texts[1] != texts[2]


def test_the_nearest_question_is_the_one_about_the_same(copies):
    items = [item for name in ("openbookqa", "ai2d") for item in read_source(name, copies[name])]
    for earlier, target in conversations(items, size=4)["T,V"]:
        topic = next(t for t in TOPICS if t in target.question)
        assert topic in earlier.question


@pytest.mark.parametrize(
    ("reply", "letter"),
    [("B", "B"), (" C. water", "C"), ("The answer is D", "D"), ("Apple", ""), ("(A)", "A")],
)
def test_letters_are_read_from_replies(reply, letter):
    assert letter_of(reply) == letter


@pytest.mark.parametrize("context", ["own", "gold"])
def test_a_model_is_scored_on_the_last_turn(context, copies, llava, processor, tmp_path):
    sources = {name: copies[name] for name in ("mmlu", "ai2d")}
    build_conversations(tmp_path / "iit", sources, size=2)
    results = evaluate_conversations(
        llava, processor, tmp_path / "iit", tmp_path / "out", context, limit=1
    )
    assert {name: entry["n"] for name, entry in results["settings"].items()} == dict.fromkeys(
        SETTINGS, 1
    )
    lines = (tmp_path / "out" / f"iit-{context}.jsonl").read_text().splitlines()
    rows = {row["setting"]: row for row in map(json.loads, lines)}
    gold = {sample.id: sample.turns for sample in read_conversations(tmp_path / "iit")}
    for row in rows.values():
        replies = [turn.reply for turn in gold[row["id"]][:-1]]
        assert len(row["replies"]) == len(replies)
        if replies:
            assert (row["replies"] == replies) == (context == "gold")
        assert row["score"] == (letter_of(row["prediction"]) == row["answer"])
    assert "reconstruction" in results["label"]


def test_wrong_input_is_named(copies, tmp_path):
    with pytest.raises(InputError, match="did you mean 'mmlu'"):
        read_source("mmlv")
    with pytest.raises(InputError, match="neither a path nor a data set"):
        read_source("mmlu", "nobody/nothing")
    with pytest.raises(InputError, match="row 0, is not in the format of hellaswag"):
        read_source("hellaswag", copies["mmlu"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no .parquet"):
        read_source("mmlu", str(tmp_path / "empty"))
    with pytest.raises(InputError, match="no question has an image"):
        build_conversations(tmp_path / "out", {"mmlu": copies["mmlu"]})
    with pytest.raises(InputError, match="three different text-only"):
        build_conversations(tmp_path / "out", {"ai2d": copies["ai2d"]})
    with pytest.raises(InputError, match="cannot read .*iit.jsonl"):
        read_conversations(tmp_path / "empty")


TURN = {"question": "What?", "options": ["a", "b"], "answer": "A", "image": "images/a.png"}
LINE = {"id": "V/0000", "setting": "V", "turns": [TURN]}


def changed(**fields):
    return json.dumps(LINE | fields)


def written(folder, *lines):
    (folder / "images").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(folder / "images" / "a.png")
    (folder / "iit.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "holds no conversations; build it"),
        ("\n\n", "holds no conversations; build it"),
        ("{}", "line 1 of .*iit.jsonl is damaged .*missing required field `id`"),
        ("null", "Expected `object`, got `null`"),
        (changed(turns=[]), "of length >= 1"),
        (changed(turns=[TURN, TURN]), "2 turns for the setting V"),
        (changed(setting="W"), "its setting 'W' is none of T; T,T"),
        (changed(id=7), r"Expected `str`, got `int` - at `\$.id`"),
        (changed(nosuch=1), "unknown field `nosuch`"),
        (changed(turns=[TURN | {"answer": "C"}]), "answer 'C' is none of its options"),
        (changed(turns=[TURN | {"answer": ""}]), "answer '' is none of its options"),
        (changed(turns=[TURN | {"options": "ab"}]), "Expected `array`, got `str`"),
        (changed(turns=[TURN | {"image": "images/b.png"}]), "an image of line 1 .* cannot be used"),
        (f"{changed()}\n{changed()}", "holds 'V/0000' more than once"),
        ("[" * 100_000, "is damaged"),
        ("{", "is damaged"),
        ("1e999", "is damaged"),
    ],
)
def test_files_without_conversations_are_named(line, message, tmp_path):
    """An empty file had no accuracy at all, and ended well."""
    with pytest.raises(InputError, match=message) as caught:
        evaluate_conversations(None, None, written(tmp_path / "iit", line), tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_conversations_name_images_of_their_folder(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    for name in ("../secret.png", str(tmp_path / "secret.png"), "http://127.0.0.1:9/a.png"):
        turns = [LINE["turns"][0] | {"image": name}]
        folder = written(tmp_path / "iit", json.dumps(LINE | {"turns": turns}))
        with pytest.raises(
            InputError,
            match=r"line 1 of .*iit.jsonl cannot be used: .*(leads out of|nothing is downloaded)",
        ):
            read_conversations(folder)
        if "://" not in name:
            (sample,) = read_conversations(DataRoot(folder, allow_outside=True))
            assert len(sample.images) == 1


def test_sources_name_images_of_their_folder(tmp_path):
    copy = tmp_path / "copy"
    for folder in ("images", "dev"):
        (copy / folder).mkdir(parents=True)
    for path in (tmp_path / "secret.png", copy / "images" / "a.png", copy / "AAAA"):
        Image.new("RGB", (8, 8)).save(path, "PNG")
    content = (copy / "images" / "a.png").read_bytes()
    root = DataRoot(copy / "dev", top=copy)
    for cell in ("../images/a.png", "../AAAA", {"path": "../images/a.png"}):
        assert image_bytes(cell, root) == content
    encoded = base64.b64encode(content).decode()
    assert image_bytes(encoded, root) == image_bytes([{"bytes": content}], root) == content
    for cell in ("../../secret.png", str(tmp_path / "secret.png"), "http://127.0.0.1:9/a.png"):
        with pytest.raises(InputError, match="leads out of|nothing is downloaded"):
            image_bytes(cell, root)
    assert image_bytes("../../secret.png", DataRoot(copy / "dev", True, copy)) == content


def test_special_tokens_in_conversations_are_text(llava, processor, tmp_path):
    turns = [
        {"question": "What <image> is </s>?", "options": ["<image>", "b"], "answer": "A", "image": None},
        LINE["turns"][0] | {"question": "And <image>?"},
    ]  # fmt: skip
    folder = written(tmp_path / "iit", json.dumps(LINE | {"setting": "T,V", "turns": turns}))
    results = evaluate_conversations(llava, processor, folder, tmp_path / "out", "gold")
    assert results["settings"]["T,V"]["n"] == 1
