"""Files are read only where they are regular, and written whole, beside other writers or not at all."""

import os
import socket
import stat
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from vlm_prune.vlm.common import files
from vlm_prune.vlm.common.errors import InputError, one_line
from vlm_prune.vlm.common.files import (
    atomic_path,
    check_output,
    output_folder,
    read_bytes,
    read_json,
    read_object,
    read_text,
    write_folder,
    write_json,
    write_text,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@dataclass
class Settings:
    name: str = "a"
    path: Path = Path("b")


def test_json_is_written_of_records_and_numbers_of_numpy(tmp_path):
    content = {"a": np.float32(0.5), "b": float("inf"), "c": Settings(), 4: (1, np.int64(2))}
    write_json(tmp_path / "new" / "file.json", content)
    found = read_json(tmp_path / "new" / "file.json")
    assert found == {"a": 0.5, "b": float("inf"), "c": {"name": "a", "path": "b"}, "4": [1, 2]}
    assert names(tmp_path / "new") == ["file.json"]


def test_a_block_that_fails_leaves_the_older_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    write_text(path, "old")
    path.chmod(0o640)
    with pytest.raises(ZeroDivisionError), atomic_path(path) as partial:
        partial.write_text("half")
        1 / 0  # noqa: B018
    assert path.read_text() == "old" and names(tmp_path) == ["file"]
    write_text(path, "new")
    assert path.read_text() == "new" and stat.S_IMODE(path.stat().st_mode) == 0o640


def test_two_writers_do_not_meet(tmp_path):
    path = tmp_path / "file"
    with atomic_path(path) as first, atomic_path(path) as second:
        first.write_text("first")
        second.write_text("second")
        assert first != second and names(tmp_path) != ["file"]
    assert path.read_text() == "first" and names(tmp_path) == ["file"]


def test_a_link_is_followed(tmp_path):
    (tmp_path / "there").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "there" / "file")
    write_text(link, "content")
    write_text(link, "again")
    assert link.is_symlink() and (tmp_path / "there" / "file").read_text() == "again"
    link.unlink()
    link.symlink_to(link)
    with pytest.raises(InputError, match="leads nowhere"):
        write_text(link, "content")


def odd(folder):
    """What is no regular file, by kind."""
    os.mkfifo(folder / "pipe")
    (folder / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(folder)
        server.bind("socket")
        os.chdir(here)
    return {
        "a named pipe": folder / "pipe",
        "a folder": folder / "folder",
        "a socket": folder / "socket",
        "a device": Path("/dev/null"),
    }


def test_only_regular_files_are_written_and_read(tmp_path):
    for kind, path in odd(tmp_path).items():
        for write in (check_output, lambda path: write_text(path, "content")):
            with pytest.raises(InputError, match=f"is {kind}"):
                write(path)
        with pytest.raises(InputError, match=rf"cannot read .*({kind}|No such device)"):
            read_bytes(path)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    for path in (Path(), Path("."), Path("/"), Path("..")):
        with pytest.raises(InputError, match="is a folder"):
            check_output(path)
    with pytest.raises(InputError, match="No such file"):
        read_bytes(tmp_path / "nothing")
    with pytest.raises(InputError, match="null byte"):
        read_bytes(Path("a\0b"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot read .* as JSON"),
        (b"\x80abc", "is not UTF-8 text"),
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


def test_endless_files_are_no_json(tmp_path):
    with (tmp_path / "large.json").open("wb") as large:
        large.truncate(2**31)
    with pytest.raises(InputError, match="more than"):
        read_json(tmp_path / "large.json")


def test_a_file_that_is_too_large_or_no_text_is_refused(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"\xff" * 100)
    assert read_bytes(path, 100) == b"\xff" * 100
    with pytest.raises(InputError, match="more than"):
        read_bytes(path, 99)
    with pytest.raises(InputError, match="not UTF-8"):
        read_text(path)


def test_the_working_folder_and_the_root_are_no_folders_for_results(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    for path in ("", ".", "./", "/", "/tmp/..", tmp_path):
        with pytest.raises(InputError, match="no folder of its own"):
            output_folder(Path(path))
    with pytest.raises(InputError, match="is a file; give a folder"):
        output_folder(Path("file"))
    assert output_folder(Path("runs/one")) == tmp_path / "runs" / "one"


def test_checking_an_output_leaves_nothing_behind(tmp_path):
    check_output(tmp_path / "a" / "b" / "file")
    assert not names(tmp_path)
    (tmp_path / "file").write_text("old")
    check_output(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "old" and names(tmp_path) == ["file"]
    with pytest.raises(InputError, match="file is a file, not a folder"):
        check_output(tmp_path / "file" / "below")


@pytest.mark.skipif(not os.path.exists("/proc/self"), reason="needs /proc")
def test_an_output_that_cannot_be_written_is_found_before(tmp_path):
    with pytest.raises(OSError):
        check_output(Path("/proc/vlm-prune/file"))


def test_a_folder_is_written_whole(tmp_path):
    def fill(content):
        return lambda folder: (folder / "part").write_text(content)

    def fail(folder):
        fill("half")(folder)
        raise KeyboardInterrupt

    target = tmp_path / "deep" / "folder"
    write_folder(target, fill("old"))
    (target / "more").write_text("")
    with pytest.raises(KeyboardInterrupt):
        write_folder(target, fail)
    assert names(target) == ["more", "part"] and names(target.parent) == ["folder"]
    write_folder(target, fill("new"))
    assert (target / "part").read_text() == "new" and names(target) == ["part"]
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(InputError, match="no folder"):
        write_folder(tmp_path / "link", fill("new"))
    for refused in (Path("/"), Path("."), Path("")):
        with pytest.raises(InputError, match="no folder of its own"):
            write_folder(refused, fail)


def test_what_killed_writers_left_goes_with_the_next_one(tmp_path):
    code = (
        "import os, sys, pathlib; from vlm_prune.vlm.common.files import atomic_path, write_folder\n"
        "target = pathlib.Path(sys.argv[1])\n"
        "with atomic_path(target / 'file') as partial:\n"
        "    write_folder(target / 'folder', lambda folder: os.kill(os.getpid(), 9))\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=False)
    left = list(tmp_path.iterdir())
    assert len(left) == 2 and all(path.name.endswith(".partial") for path in left)
    write_text(tmp_path / "file", "")
    assert len(names(tmp_path)) == 3  # another machine's writer may still be at it
    past = time.time() - 2 * files.LEFTOVER_SECONDS
    for path in left:
        os.utime(path, (past, past))
    write_text(tmp_path / "file", "")
    write_folder(tmp_path / "folder", lambda folder: None)
    assert names(tmp_path) == ["file", "folder"]


def test_one_line_escapes_what_moves_a_terminal():
    assert one_line("a\n b\t\x1b[31mred\u202e") == "a b \\x1b[31mred\\u202e"
