"""What is data is shown as it is: brackets in names, questions and answers are no markup."""

import numpy as np
import pytest
from PIL import Image

from vlm_prune.benchmarks.stats.table import as_table, show
from vlm_prune.continual.metrics import AccuracyMatrix
from vlm_prune.pruning.pipeline import PrunedVLM, Reply

MARKUP = "[red]x[/blue] [/] :star: [link=a]b"
NAME = "[red]x[/blue] [bold]y"  # as a path, a folder in a folder


@pytest.fixture(scope="module")
def named(llava_tiny, tmp_path_factory):
    """A folder with a checkpoint and an image, both below a name with brackets."""
    folder = tmp_path_factory.mktemp("markup") / NAME
    llava_tiny.model.save_pretrained(folder / "model")
    llava_tiny.processor.save_pretrained(folder / "model")
    Image.new("RGB", (60, 60), "red").save(folder / "image.png")
    return folder


COMMANDS = {
    "eval": ("eval", "--tasks", "text", "--limit", "2", "--output", "{out}"),
    "compare": ("compare", "--method", "divprune,random", "--tasks", "text", "--limit", "2",
                "--output", "{out}"),
    "schedule": ("schedule", "--data", "exist", "--limit", "2", "--output", "{out}"),
    "ask": ("ask", "{image}", MARKUP),
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_end_well_and_show_names_whole(run, named, tmp_path, command, monkeypatch):
    out = tmp_path / NAME / "out"
    words = [w.format(out=out, image=named / "image.png") for w in COMMANDS[command]]

    def repeat(self, images, questions):
        return [Reply(question, None, None) for question in questions]

    monkeypatch.setattr(PrunedVLM, "replies", repeat)
    code, shown, err = run(*words, "--model", named / "model", "--budget", "8")
    assert code == 0, err
    if command == "ask":
        assert shown == f"{MARKUP}\n"
    if command == "schedule":
        assert str(out / "schedule.json") in shown
    if command == "eval":
        code, shown, err = run("report", out)
        assert code == 0 and str(out / "report.html") in shown, err


def test_export_names_its_folder(run, named, tmp_path):
    out = tmp_path / NAME / "exported"
    code, shown, err = run("export", named / "model", out)
    assert code == 0 and shown.startswith(f"{out}: "), err


def test_a_refusal_names_what_was_given(run, named):
    code, _, err = run("ask", named / "missing.png", "red?", "--model", named / "model")
    assert code == 2 and str(named / "missing.png") in err
    code, _, err = run("ask", named / "image.png", "red?", "--model", MARKUP)
    assert code == 2 and f"{MARKUP!r}" in err


def test_tables_and_lines_are_no_markup(capsys):
    show(as_table([["task", MARKUP], [MARKUP, "1"]]))
    show(MARKUP)
    hits = (np.ones((1, 2), np.uint8),), (np.ones(2, np.uint8),)
    show(AccuracyMatrix((MARKUP,), *hits).table())
    out = capsys.readouterr().out
    assert out.count(MARKUP) >= 4
