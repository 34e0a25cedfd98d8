"""Two commits of a small package are run in turn; what stops a comparison is one line."""

import json
import subprocess

import pytest

from vlm_prune.benchmarks.speed import against
from vlm_prune.vlm.common.errors import InputError

COMMAND = """
import json, sys
from pathlib import Path
def {function}():
    assert sys.argv[0] == "vlm-prune"
    if sys.argv[1] != "eval":
        sys.exit("Error: no " + sys.argv[1])
    folder = Path(sys.argv[sys.argv.index("--output") + 1])
    folder.mkdir()
    held = bytearray({megabytes} * 2**20)
    times = dict(vision=1.0, selection={selection}, prefill=3.0, decode=4.0)
    row = dict(id="exist/0", baseline="no", prediction="no", kept=[{kept}], time_ms=times)
    (folder / "samples.jsonl").write_text(json.dumps(row) + chr(10))
"""


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Its first commit has another entry point, takes more memory and keeps other tokens."""

    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    (tmp_path / ".typing/vlm_prune").mkdir(parents=True)
    (tmp_path / ".typing/vlm_prune/small").symlink_to("../../small")
    (tmp_path / "small").mkdir()
    git("init")
    for function, megabytes, selection, kept in (("main", 300, 8.0, 1), ("start", 1, 2.0, 2)):
        script = f'[project.scripts]\nvlm-prune = "vlm_prune.small.app:{function}"\n'
        (tmp_path / "pyproject.toml").write_text(script)
        (tmp_path / "small/app.py").write_text(
            COMMAND.format(function=function, megabytes=megabytes, selection=selection, kept=kept)
        )
        git("add", "-A")
        git("commit", "-m", function)
    monkeypatch.setattr(against, "ROOT", tmp_path)
    return tmp_path


def test_each_commit_runs_its_own_code_and_entry_point(repository):
    found = against.compare_with("HEAD~1", ["eval --limit 2"], repeats=1)
    (result,) = found["results"]
    assert 300 < result["before"]["peak MB"] < 400 and result["now"]["peak MB"] < 100
    assert result["ratio"]["selection ms"] == 0.25 and result["ratio"]["prefill ms"] == 1
    assert result["differing"] == {"questions": 1, "baseline": 0, "prediction": 0, "kept": 1}
    table = against.comparison_rows(json.loads(json.dumps(found)))
    assert ["", "selection ms", "8.000", "2.000", "0.25x"] in table
    # the temporary checkout is gone, also from git's list
    assert len(against.git("worktree", "list").splitlines()) == 1
    assert found["commits"]["before"] == against.commit_of("HEAD~1") != found["commits"]["now"]


def test_what_stops_a_comparison_is_one_line(repository, monkeypatch, tmp_path_factory):
    for commit, commands, message in (
        ("nosuch", ["eval"], "no such commit: 'nosuch'"),
        ("HEAD:small", ["eval"], "no such commit: 'HEAD:small'"),
        ("--all", ["eval"], "no such commit: '--all'"),
        ("HEAD", [""], "--run is empty"),
        ("HEAD", ["eval '"], "no closing quotation"),
        ("HEAD", ["nosuch"], "vlm-prune nosuch: Error: no nosuch"),
    ):
        with pytest.raises(InputError, match=message):
            against.compare_with(commit, commands, repeats=1)
    assert len(against.git("worktree", "list").splitlines()) == 1
    (repository / "pyproject.toml").unlink()
    with pytest.raises(InputError, match="has no command vlm-prune"):
        against.Tree(repository, "abc").program()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="install it"):
        against.commit_of("HEAD")
    monkeypatch.setattr(against, "ROOT", tmp_path_factory.mktemp("none"))
    with pytest.raises(InputError, match="clone it"):
        against.commit_of("HEAD")
