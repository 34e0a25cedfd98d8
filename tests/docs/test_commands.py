"""Every command and example of the README and the documentation runs, or says what it needs.

Those of long pages run in the slow tests; by default their commands must exist.

Blocks of a page run one after the other in one folder. A comment above a block changes that:
`<!-- needs: gpu -->` (or another of `NEEDS`): it is not run, but its commands, options, extras and
targets must exist; `<!-- test with: --limit 6 -->`: each command gets these options at its end.
A `text` block below a Python block is what that prints. Python that is not run, for want of weights
or vLLM, must at least define every name that it uses.
"""

import contextlib
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
from tiny_families import Tiny
from video_files import write_clip

from vlm_prune.benchmarks.cli import app as cli
from vlm_prune.benchmarks.cli import commands
from vlm_prune.benchmarks.tasks import TASKS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NEEDS = {"gpu", "vllm", "weights", "network", "files", "hours", "a browser", "your package"}
FENCE = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]*?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
# What a person waits for, tests need not: few questions, unless the page says otherwise.
SMALL = {"eval": ["--limit", "9"], "compare": ["--limit", "6", "--batch-size", "6"]}
# Pages whose commands other tests run in other words; by default these must exist.
LONG = {
    "docs/commands.md", "docs/continual.md", "docs/lmms-eval.md", "docs/models/tiny-video.md",
    "docs/sparse_attention.md", "docs/video.md", "docs/wings.md",
}  # fmt: skip


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language, its text, what the comment above it says, its line."""

    language: str
    text: str
    needs: str
    options: tuple[str, ...]
    line: int

    def commands(self) -> list[str]:
        """The lines of a shell block, continued ones joined, without comments."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line for line in lines if shlex.split(line, comments=True)]


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page in order."""
    content, found = page.read_text(), []
    for match in FENCE.finditer(content):
        kind, _, value = (match["mark"] or "").partition(": ")
        found.append(
            Block(
                match["language"], match["text"], value if kind == "needs" else "",
                tuple(shlex.split(value)) if kind == "test with" else (),
                content.count("\n", 0, match.start()) + 1,
            )
        )  # fmt: skip
    return found


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder with the pictures that the pages speak of, as working directory."""
    picture = TASKS["exist"].sample(0).images[0]
    (tmp_path / "photos").mkdir()
    for name in ("photo.jpg", "photos/one.jpg", "photos/two.jpg"):
        picture.save(tmp_path / name)
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    return tmp_path


def named(page):
    """A page's path in the project; a test of a long page is slow."""
    name = str(page.relative_to(ROOT))
    return pytest.param(page, id=name, marks=pytest.mark.slow if name in LONG else ())


@pytest.mark.parametrize("page", [named(page) for page in PAGES])
def test_every_block_of_a_page_runs(page, folder, monkeypatch):
    names: dict = {"__name__": "__main__"}
    printed = ""
    for block in blocks(page):
        where = f"{page.name}:{block.line}"
        assert block.needs in NEEDS | {""}, f"{where}: {block.needs!r} is not among {NEEDS}"
        if block.language == "python":
            code = compile(block.text, where, "exec")
            if not block.needs:
                with contextlib.redirect_stdout(io.StringIO()) as stream:
                    exec(code, names)  # noqa: S102  the pages' own examples
                printed = stream.getvalue()
        elif block.language == "text":
            assert printed.split() == block.text.split(), f"{where}: this is printed:\n{printed}"
        elif block.language == "sh":
            for command in block.commands():
                check = exists if block.needs else run
                check(shlex.split(command, comments=True), command, block, where, monkeypatch)
        else:
            assert block.language in ("toml", "json", "mermaid"), f"{where}: name the language"


@pytest.mark.parametrize("name", sorted(LONG))
def test_every_command_of_a_long_page_exists(name, monkeypatch):
    page = ROOT / name
    monkeypatch.chdir(ROOT)
    shell = [block for block in blocks(page) if block.language == "sh"]
    assert shell
    for block in shell:
        for command in block.commands():
            words = shlex.split(command, comments=True)
            exists(words, command, block, f"{name}:{block.line}", monkeypatch)


def test_every_name_in_the_python_of_a_page_is_defined():
    check = ["-m", "ruff", "check", "--isolated", "--select", "F821", "--output-format", "concise"]
    for page in PAGES:
        source = "\n".join(block.text for block in blocks(page) if block.language == "python")
        if source:
            done = subprocess.run(
                [sys.executable, *check, "-"], input=source, capture_output=True, text=True,
                check=False,
            )  # fmt: skip
            assert done.returncode == 0, f"{page}: {done.stdout}{done.stderr}"


def test_python_on_videos_runs_on_a_model_of_random_weights(folder, capsys):
    pytest.importorskip("av")
    page = ROOT / "docs/video.md"
    released = {
        "qwen2_5_vl": "Qwen/Qwen2.5-VL-7B-Instruct",
        "internvl": "OpenGVLab/InternVL3-1B-hf",
    }
    for name in released:
        tiny = Tiny(name)
        tiny.model.save_pretrained(folder / name)
        tiny.processor.save_pretrained(folder / name)
    write_clip(folder / "clip.mp4", range(0, 4000, 100))
    examples = [block for block in blocks(page) if block.language == "python"]
    assert examples
    for block in examples:
        text = block.text
        for name, checkpoint in released.items():
            text = text.replace(checkpoint, str(folder / name))
        exec(compile(text, f"{page.name}:{block.line}", "exec"), {})  # noqa: S102
    assert " of " in capsys.readouterr().out


def run(words, command, block, where, monkeypatch):
    """Run a command line; ours within this process, others as a person would."""
    if words[0] == "vlm-prune":
        words = [*words, *(block.options or SMALL.get(words[1], ()))]
        monkeypatch.setattr("sys.argv", words)
        ends_well(cli.main, where)
    elif words[:1] == ["python"] and words[1].startswith("scripts/"):
        monkeypatch.setattr("sys.argv", [*words[1:], *block.options])
        ends_well(lambda: runpy.run_path(words[1], run_name="__main__"), where)
    else:
        done = subprocess.run(["bash", "-ec", command], check=False, capture_output=True, text=True)
        assert done.returncode == 0, f"{where}: {done.stdout}{done.stderr}"


def ends_well(main, where):
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            main()
        except SystemExit as stop:
            assert not stop.code, f"{where} ended with {stop.code}"


def exists(words, command, block, where, monkeypatch):
    """Check that what a command names is there, though it cannot run here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = re.findall(r"\.\[([\w,]+)\]", command)
    for extra in ",".join(extras).split(",") if extras else ():
        assert extra in project["optional-dependencies"], f"{where}: no extra {extra}"
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), where
    if words[0] == "vlm-prune":
        group = typer.main.get_command(commands.app)
        subcommand = group.commands[words[1]]
        with monkeypatch.context() as patch:
            patch.setattr("vlm_prune.vlm.load.choose_device", str)  # a GPU that is not here
            subcommand.make_context(words[1], words[2:], resilient_parsing=False)
    for script in [word for word in words if word.startswith("scripts/")]:
        assert (ROOT / script).is_file(), f"{where}: no {script}"
        sources = [ROOT / script, *(ROOT / "benchmarks").rglob("*.py")]
        known = set(re.findall(r"\w+", " ".join(source.read_text() for source in sources)))
        for option in (word for word in words if word.startswith("--")):
            name = option.removeprefix("--").replace("-", "_")
            assert name in known, f"{where}: {script} has no {option}"
