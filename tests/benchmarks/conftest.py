"""A small checkpoint on disk, and the command run in this process."""

import pytest

from vlm_prune.benchmarks import cli


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
