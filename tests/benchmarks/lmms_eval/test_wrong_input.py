"""What cannot work: one clear line each, and the rest of the run is kept."""

import io
import json
import os
import shutil
import subprocess
import sys

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

FAST = ["--limit", "4", "--budget", "16", "--batch-size", "4"]


def shard(folder, name="test-00000-of-00001.parquet"):
    return folder / "POPE" / "data" / name


@pytest.fixture
def copy(data_root, tmp_path):
    shutil.copytree(data_root / "POPE", tmp_path / "data" / "POPE")
    shutil.copytree(data_root / "ScienceQA", tmp_path / "data" / "ScienceQA")
    return tmp_path / "data"


def halved(folder):
    content = shard(folder).read_bytes()
    shard(folder).write_bytes(content[: len(content) // 2])


def one_of_three(folder):
    shard(folder).rename(shard(folder, "test-00000-of-00003.parquet"))


def absent(folder):
    shard(folder).unlink()


def without_answers(folder):
    import datasets

    table = datasets.Dataset.from_parquet(str(shard(folder))).remove_columns("answer")
    table.to_parquet(str(shard(folder)))


DAMAGE = {
    "half a file": (halved, "damaged or half downloaded"),
    "one of three files": (one_of_three, "holds 1 of 3 files, number 00001 is missing"),
    "no file": (absent, "holds no split 'test': expected test-*.parquet"),
    "another schema": (without_answers, "answer"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_data(run, checkpoint, copy, tmp_path, name):
    damage, message = DAMAGE[name]
    damage(copy)
    code, out, err = run(
        "eval", "--model", checkpoint, "--tasks", "pope,scienceqa_img", "--data-root", copy,
        "--output", tmp_path / "out", *FAST,
    )  # fmt: skip
    assert code == 0 and "scienceqa_img" in out
    assert err.startswith("pope skipped: ") and message in err
    assert len(err.strip().splitlines()) == 1
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["tasks"]) == ["scienceqa_img"] and list(results["skipped"]) == ["pope"]


def spoil(folder, count, broken):
    """`count` rows in place of the few, some of them with something else than an image."""
    rows = parquet.read_table(shard(folder))
    table = rows.take([number % len(rows) for number in range(count)])
    place = table.schema.get_field_index("image")
    column, images = table.field(place), table["image"].to_pylist()
    for number, content in broken.items():
        images[number]["bytes"] = content(images[number]["bytes"])
    table = table.set_column(place, column, pa.array(images, column.type))
    parquet.write_table(table, shard(folder))


def bomb(_):
    file = io.BytesIO()
    Image.new("1", (10_000, 9_000)).save(file, "PNG")
    return file.getvalue()


BROKEN = {1: lambda image: image[:60], 3: lambda _: b"no image", 9_998: bomb}


def test_ten_thousand_rows_with_three_broken_images(data_root, tmp_path):
    from vlm_prune.benchmarks.lmms_eval.load import load_task

    shutil.copytree(data_root / "POPE", tmp_path / "POPE")
    spoil(tmp_path, 10_000, BROKEN)
    task = load_task("pope", tmp_path)
    assert len(task.eval_docs) == len(task.eval_docs_no_media) == 10_000 - 3
    assert list(task.unreadable) == list(BROKEN)
    cut, text, large = task.unreadable.values()
    assert "cannot read image" in cut and "no image that" in text and "89 million" in large
    # places count the rows that are left: the fifth of the file is the third
    assert [task.eval_docs[place]["question_id"] for place in (0, 1, 2)] == ["1", "3", "1"]
    assert list(load_task("pope", tmp_path, limit=2).unreadable) == [1]  # looks no further


def test_broken_images_are_named_and_the_others_asked(run, checkpoint, copy, tmp_path):
    spoil(copy, 8, dict(list(BROKEN.items())[:2]))
    code, _, err = run(
        "eval", "--model", checkpoint, "--tasks", "pope,scienceqa_img", "--data-root", copy,
        "--output", tmp_path / "out", "--limit", "8", *FAST[2:],
    )  # fmt: skip
    assert code == 0, err
    lines = err.strip().splitlines()
    assert [line.split(" skipped: ")[0] for line in lines] == ["pope row 1", "pope row 3"]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {name: task["n"] for name, task in results["tasks"].items()} == {
        "pope": 4, "scienceqa_img": 3,
    }  # fmt: skip
    assert list(results["skipped"]) == ["pope row 1", "pope row 3"]
    assert run("report", tmp_path / "out")[0] == 0


def test_tasks_that_cannot_be_run(run, checkpoint, copy, tmp_path):
    names = "mmbench_en_dev,vqav2_val,mmvet,scienceqa_img"
    code, _, err = run(
        "eval", "--model", checkpoint, "--tasks", names, "--data-root", copy, "--output",
        tmp_path / "out", *FAST,
    )  # fmt: skip
    assert code == 0, err
    lines = dict(line.split(" skipped: ") for line in err.strip().splitlines())
    assert set(lines) == {"mmbench_en_dev", "vqav2_val", "mmvet"}
    assert "judge model" in lines["mmbench_en_dev"]
    assert "run mmbench_en_dev_static" in lines["mmbench_en_dev"]
    assert "judge" in lines["mmvet"] or "needs the package" in lines["mmvet"]
    assert "'lmms-lab-encoder/VQAv2'" in lines["vqav2_val"]
    assert "--data-root FOLDER with a copy in FOLDER/VQAv2" in lines["vqav2_val"]


def test_nothing_to_run(run, checkpoint, tmp_path):
    code, _, err = run("eval", "--model", checkpoint, "--tasks", "pope", *FAST)
    assert code == 2
    assert "no connection, or offline mode" in err and "no task could be run" in err
    code, _, err = run(
        "eval", "--model", checkpoint, "--tasks", "pope", "--data-root", "/no", *FAST
    )
    assert code == 2 and "--data-root /no is no folder" in err


def test_unknown_task(run, checkpoint):
    code, _, err = run("eval", "--model", checkpoint, "--tasks", "scienceqa_imgs", *FAST)
    assert (
        code == 2 and err == "Error: unknown task 'scienceqa_imgs'; did you mean 'scienceqa_img'?\n"
    )


def test_without_lmms_eval(run, checkpoint, monkeypatch):
    from vlm_prune.benchmarks import lmms_eval

    monkeypatch.setattr(lmms_eval, "installed", lambda: False)
    code, _, err = run("eval", "--model", checkpoint, "--tasks", "gqa", *FAST)
    assert code == 2 and "vlm-prune[eval]" in err and len(err.strip().splitlines()) == 1


def test_gated_data(monkeypatch):
    from datasets.exceptions import DatasetNotFoundError
    from lmms_eval.api import task

    from vlm_prune.benchmarks.lmms_eval.load import load_task
    from vlm_prune.vlm.common.errors import InputError

    def gated(*args, **kwargs):
        assert "token" not in kwargs
        raise DatasetNotFoundError("Dataset 'lmms-lab-encoder/POPE' is a gated dataset on the Hub.")

    monkeypatch.setattr(task.datasets, "load_dataset", gated)
    with pytest.raises(InputError, match="'lmms-lab-encoder/POPE' of task 'pope' is gated"):
        load_task("pope", None)


def test_a_folder_of_another_version(run, checkpoint, copy, tmp_path):
    command = ["eval", "--model", checkpoint, "--tasks", "pope", "--data-root", copy, *FAST]
    out = tmp_path / "out"
    out.mkdir()
    for content, message in (('{"model": "tiny"}', "of another version"), ("{", "as JSON")):
        (out / "config.json").write_text(content)
        code, _, err = run(*command, "--output", out)
        assert code == 2 and message in err and len(err.strip().splitlines()) == 1


def test_two_runs_in_one_folder(run, checkpoint, copy, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    code = "import sys; from filelock import FileLock\nwith FileLock(sys.argv[1]): input(print())"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, out / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    holder.stdout.readline()
    command = ["eval", "--model", checkpoint, "--tasks", "pope", "--data-root", copy, *FAST]
    code, _, err = run(*command, "--output", out)
    assert code == 2 and f"another run writes to {out}" in err
    holder.communicate(b"\n")
    assert holder.returncode == 0
    assert run(*command, "--output", out)[0] == 0
    assert os.listdir(out / "answers") == ["pope"]
