"""Files are written whole or not at all, and hostile JSON is refused in one line."""

import json
import os

import pytest

from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.files import locked, read_json, read_object, whole, write_json


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "results.json"
    write_json(path, {"a": 1})
    with pytest.raises(OSError, match="disk"), whole(path) as partial:
        partial.write_text("half")
        raise OSError("disk full")
    assert json.loads(path.read_text()) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot read .* as JSON"),
        (b"\x80abc", "cannot read .* as JSON"),
        (b'{"a": ', "cannot read .* as JSON"),
        (b"[" * 200_000, "is nested too deeply"),
        (b'{"a":' * 200_000, "is nested too deeply"),
        (b"9" * 10_000, "cannot read .* as JSON"),
    ],
    ids=["empty", "no UTF-8", "cut off", "brackets", "objects", "digits"],
)
def test_json_that_cannot_be_read_is_refused_in_one_line(content, message, tmp_path):
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_json(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["null", "[]", "3", '"text"'])
def test_other_values_than_an_object_are_refused(content, tmp_path):
    path = tmp_path / "file.json"
    path.write_text(content)
    with pytest.raises(InputError, match="where a JSON object is expected"):
        read_object(path)


def test_pipes_folders_and_endless_files_are_no_json(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "large.json").open("wb") as large:
        large.truncate(2**31)
    for name, message in (
        ("pipe", "no regular file"), (".", "no regular file"), ("large.json", "too large"),
        ("missing.json", "there is no"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            read_json(tmp_path / name)


def test_a_folder_is_locked_against_a_second_run(tmp_path):
    folder = tmp_path / "new"
    with locked(folder), pytest.raises(InputError, match="another run writes to"), locked(folder):
        pass
    with locked(folder):
        pass
