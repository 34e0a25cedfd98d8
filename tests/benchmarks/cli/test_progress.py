"""What a command shows while it works."""

import json
from contextlib import contextmanager

from vlm_prune.benchmarks.cli import runs


def test_a_run_shows_its_results_while_it_goes_on(run, tmp_path, monkeypatch):
    """On a terminal, behind each batch."""
    shown = []

    @contextmanager
    def recording(total, what="questions"):
        yield lambda done, found="": shown.append((done, found))

    monkeypatch.setattr(runs, "progress", recording)
    options = "--method", "random", "--budget", "64", "--tasks", "exist", "--limit", "4"
    code, _, err = run("eval", *options, "--batch-size", "2", "--output", tmp_path / "run")
    assert code == 0, err
    rows = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    for batch, (done, found) in enumerate(shown, 1):
        answered = rows[: 2 * batch]
        pruned, unpruned = (sum(r[k] for r in answered) for k in ("score", "baseline_score"))
        assert done == 2
        assert found == f"right: pruned {pruned:g}, unpruned {unpruned:g} of {2 * batch};"
    assert len(shown) == 2
