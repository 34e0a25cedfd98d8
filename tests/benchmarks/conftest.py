"""A small checkpoint on disk with an adapter, its language model alone, the command run in this process, and a browser."""

import os
from pathlib import Path

import pytest
from shaken import shake
from transformers import LlamaForCausalLM

from vlm_prune.benchmarks.cli import app as cli
from vlm_prune.learners import WingsConfig, attach, detach, save_pretrained

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


@pytest.fixture(scope="session")
def folder(tiny, tmp_path_factory):
    """A checkpoint of each model family on disk."""
    path = tmp_path_factory.mktemp(tiny.name)
    tiny.model.save_pretrained(path)
    tiny.processor.save_pretrained(path)
    return path


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


@pytest.fixture(scope="session")
def adapter(llava, tmp_path_factory):
    """A Wings adapter with random learners, which change the checkpoint's answers."""
    folder = tmp_path_factory.mktemp("wings")
    attach(llava, WingsConfig(rank=4, max_positions=1024))
    shake(llava, deviation=1)
    save_pretrained(llava, folder)
    detach(llava)
    return folder


@pytest.fixture(scope="session")
def language(llava, processor, tmp_path_factory):
    """The checkpoint's language model alone, with a chat template that takes strings."""
    folder = tmp_path_factory.mktemp("language")
    alone = LlamaForCausalLM(llava.config.text_config)
    alone.model.load_state_dict(llava.model.language_model.state_dict())
    alone.tie_weights()
    alone.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}USER: "
        "{% else %} ASSISTANT: {% endif %}{{ message['content'] + '' }}{% endfor %} ASSISTANT:"
    )
    return folder
