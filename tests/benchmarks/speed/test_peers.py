"""Our methods beside others' releases: both sides measure, and what fails is said in one line."""

import sys

import pytest

from vlm_prune.benchmarks.speed import peer_worker, peers
from vlm_prune.vlm.common.errors import InputError

# The releases need an environment of their own; this stands for one, with known times.
STAND_IN = """#!{python}
import json, sys
side, method = sys.argv[2:4]
took = {{"none": (0.4, 0.1, 0), "visionzip": (0.2, 0.12, 0.02), "flowcut": (0.25, 0.15, None)}}[method]
assert side == "released"
print(json.dumps("ready"), flush=True)
for _ in sys.stdin:
    print(json.dumps(took), flush=True)
"""


@pytest.fixture
def small(monkeypatch):
    """A tower and a language model of two layers; the clock is the processor's, as in a worker."""
    monkeypatch.setattr(peer_worker.time, "perf_counter", peer_worker.time.process_time)
    monkeypatch.setattr(
        peer_worker, "TOWER",
        peer_worker.TOWER | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    )  # fmt: skip
    monkeypatch.setattr(
        peer_worker, "LANGUAGE",
        peer_worker.LANGUAGE | {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2},
    )  # fmt: skip


@pytest.mark.parametrize("method", ["none", *peers.METHODS])
def test_our_side_measures_the_first_token_and_the_images_part_of_it(method, small):
    first, encoded, selection = peer_worker.ours(method, 64)()
    assert 0 < encoded < first and selection < encoded
    assert (selection > 0) == (method != "none")


def test_ratios_are_to_the_unpruned_model_of_the_same_side(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text(STAND_IN.format(python=sys.executable))
    python.chmod(0o755)
    ours = tmp_path / "ours"
    ours.write_text(python.read_text().replace('"released"', '"ours"'))
    ours.chmod(0o755)
    monkeypatch.setattr(peers.sys, "executable", str(ours))
    monkeypatch.setattr(peers, "METHODS", ("visionzip",))
    found = peers.compare_with_peers(python, 64, 2)
    rows = {(row["side"], row["method"]): row for row in found["results"]}
    assert len(rows) == 5 and found["repeats"] == 2
    cut = rows["released", "flowcut"]
    assert cut["ms"] == pytest.approx({"first": 250, "encoded": 150, "prefill": 100})
    assert cut["speedup"]["prefill"]["mean"] == pytest.approx(3)
    assert cut["speedup"]["first"]["mean"] == pytest.approx(1.6)
    assert cut["times_ours"]["mean"] == pytest.approx(1.25)
    assert "speedup" not in rows["ours", "none"]
    assert rows["ours", "visionzip"]["ms"]["selection"] == pytest.approx(20)
    table = peers.peer_rows(found)
    (row,) = [cells for cells in table if cells[1] == "flowcut"]
    assert row[2:] == [
        "–", "100", "3.00x [3.00, 3.00]", "250", "1.60x [1.60, 1.60]", "1.25x [1.25, 1.25]",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot run .*: No such file or directory; give the interpreter of"),
        (
            "#!/bin/sh\necho \"No module named 'llava'\" >&2\nexit 1\n",
            "No module named 'llava'; see",
        ),
        ("#!/bin/sh\necho '\"ready\"'\n", "released none: it ended; see docs"),
    ],
)
def test_an_environment_without_the_releases_is_named(content, message, tmp_path, monkeypatch):
    python = tmp_path / "python"
    if content is not None:
        python.write_text(content)
        python.chmod(0o755)
    monkeypatch.setattr(peers, "RELEASES", ())
    monkeypatch.setattr(peers, "METHODS", ())
    monkeypatch.setattr(peers.sys, "executable", str(python))
    with pytest.raises(InputError, match=message):
        peers.compare_with_peers(python, 8, 1)
