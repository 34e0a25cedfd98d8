"""The schedule command, and its file given to the other commands."""

import json

import pytest
from PIL import Image

FAST = ["--limit", "2", "--batch-size", "2", "--tasks", "exist"]


@pytest.fixture(scope="module")
def analyzed(checkpoint, tmp_path_factory):
    """A schedule of the random checkpoint."""
    from vlm_prune.benchmarks.experiments import schedule as analysis
    from vlm_prune.vlm.load import load

    folder = tmp_path_factory.mktemp("schedule")
    model, processor = load(str(checkpoint))
    prompts = analysis.prompts_of_tasks(("exist", "text"), 4, 0)
    points, sizes = analysis.change_points_of(model, processor, prompts, 2)
    assert sizes == [576] * 2
    assert len(points) == 2 * 58  # a tenth of 576 tokens, of the two questions with an image
    analysis.save_schedule(analysis.proposal(model, points, 400, 3, 576), folder)
    return folder


def test_the_command_proposes_from_tasks_or_a_file(run, checkpoint, tmp_path, images):
    images[0].save(tmp_path / "a.png")
    entry = {"image": "a.png"} | {
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is red?"},
            {"from": "gpt", "value": "a star"},
        ]
    }
    (tmp_path / "data.json").write_text(json.dumps([entry]))
    for data, more in (("exist", ()), (tmp_path / "data.json", ("--images", tmp_path))):
        code, out, err = run(
            "schedule", "--model", checkpoint, "--data", data, *more, "--limit", "2",
            "--output", tmp_path / "out",
        )  # fmt: skip
        assert code == 0, err
        found = json.loads((tmp_path / "out" / "schedule.json").read_text())
        assert (
            sum(found["histogram"])
            == found["change_points"]
            == 58 * (1 if "json" in str(data) else 2)
        )
        assert found["layers"] == 6 and f"cut after {found['places']} of 6" in out
        counts = found["counts"]
        assert counts["kept"] == found["cuts"][-1]["keep"] and 63 < counts["layer_mean"] <= 64
        assert (
            f"{counts['kept']:.0f} / {counts['layer_mean']:.1f} / {counts['papers']:.1f} tok" in out
        )
        with Image.open(tmp_path / "out" / "schedule.png") as picture:
            assert picture.width > 300


@pytest.mark.parametrize("method", ["adaptinfer", "divprune+fastv"])
def test_eval_cuts_where_the_file_says(run, checkpoint, analyzed, tmp_path, method):
    code, out, err = run(
        "eval", "--model", checkpoint, "--method", method, "--budget", "400", "--output", tmp_path,
        "--schedule", analyzed / "schedule.json", *FAST,
    )  # fmt: skip
    assert code == 0, err
    assert f"{method} by schedule" in out
    found = json.loads((analyzed / "schedule.json").read_text())
    row = json.loads((tmp_path / "samples.jsonl").read_text().splitlines()[0])
    layers = row["layer_tokens"]
    assert [n for n in range(1, 6) if layers[n] < layers[n - 1]] == found["places"]
    if method == "adaptinfer":
        assert [layers[place] for place in found["places"]] == [c["keep"] for c in found["cuts"]]


def test_methods_without_cuts_refuse_a_schedule(run, checkpoint, analyzed, tmp_path):
    chosen = ["--model", checkpoint, "--schedule", analyzed / "schedule.json"]
    code, _, err = run("eval", *chosen, "--method", "zoo")
    assert code == 2 and "zoo makes no cuts" in err
    code, _, err = run("bench", "--method", "zoo", *chosen[2:])
    assert code == 2 and "zoo makes no cuts" in err
    code, _, err = run("eval", "--method", "adaptinfer", "--schedule", tmp_path / "none.json")
    assert code == 2 and "cannot read" in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "exits"], "did you mean 'exist'"),
        (["--data", "text"], "no question about an image"),
        (["--data", "none.json"], "cannot read none.json"),
        (["--budget", "600"], "above the 576 tokens"),
    ],
)
def test_wrong_input_is_one_line(run, checkpoint, tmp_path, arguments, message):
    code, _, err = run(
        "schedule", "--model", checkpoint, "--limit", "6", "--output", tmp_path, *arguments
    )
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
