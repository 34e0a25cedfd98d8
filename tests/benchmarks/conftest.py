"""A small checkpoint on disk, the command run in this process, and a browser."""

import os
from pathlib import Path

import pytest

from vlm_prune.benchmarks import cli

CHROMIUM = Path(os.environ.get("CHROMIUM", "/usr/bin/chromium"))
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE_MS = 180_000


@pytest.fixture(scope="session")
def checkpoint(llava, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    llava.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    """Run `vlm-prune ...`; returns exit code, output and errors."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["vlm-prune", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium; tests skip where there is none."""
    if not CHROMIUM.exists():
        pytest.skip(f"no browser at {CHROMIUM}")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as play:
        context = play.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("profile"), executable_path=CHROMIUM, args=FLAGS,
            timeout=PATIENCE_MS,
        )  # fmt: skip
        context.set_default_timeout(PATIENCE_MS)
        yield context
        context.close()
