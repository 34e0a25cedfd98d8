"""One process writes to a folder of results, which belongs to one set of settings."""

import json

import pytest

from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.folder import OutputFolder, check_settings, record_settings


def test_a_folder_has_one_writer_and_goes_if_nothing_was_written(tmp_path):
    path = tmp_path / "a" / "b"
    with OutputFolder(path), pytest.raises(InputError, match="another run writes"):
        OutputFolder(path)
    assert not list(tmp_path.iterdir())
    with OutputFolder(path):
        (path / "result").write_text("")
    with OutputFolder(path) as folder:
        assert folder.path == path
    assert (path / "result").is_file()


def test_a_folder_that_was_there_stays(tmp_path):
    with OutputFolder(tmp_path / "a"):
        (tmp_path / "a" / "result").write_text("")
    (tmp_path / "empty").mkdir()
    with OutputFolder(tmp_path / "empty"):
        pass
    assert (tmp_path / "empty").is_dir() and not list((tmp_path / "empty").iterdir())


def test_settings_are_recorded_once_and_compared(tmp_path):
    path = tmp_path / "run" / "config.json"
    assert not check_settings(path, {"a": 1, "b": (1, 2)})
    assert not path.parent.exists()
    record_settings(path, {"a": 1, "b": (1, 2)})
    assert check_settings(path, {"a": 1, "b": [1, 2]})
    before = path.stat().st_mtime_ns
    record_settings(path, {"a": 1, "b": [1, 2]})
    assert path.stat().st_mtime_ns == before
    with pytest.raises(InputError, match=r"holds a run with another a, b; give another --output"):
        record_settings(path, {"a": 2, "b": []})
    with pytest.raises(InputError, match="another version"):
        check_settings(path, {"a": 1})


WRONG = (
    "",
    "{",
    "[]",
    "null",
    "NaN",
    '{"a": NaN}',
    '"a"',
    "[" * 100_000,
    "\xff",
    '{"a": "\\ud800"}',
)


@pytest.mark.parametrize("text", WRONG, ids=lambda text: text[:9])
def test_damaged_settings_are_refused_in_one_line(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=rf"{path} is damaged .*; give another --output") as error:
        check_settings(path, {"a": 1})
    assert "\n" not in str(error.value)
    path.write_text(json.dumps({"a": 1}))
    assert check_settings(path, {"a": 1})
