"""What commands do with people's texts, pictures and the files that data name."""

import json

import numpy as np
import pytest
from PIL import Image

from vlm_prune.vlm.common.images import open_image


@pytest.fixture
def data(tmp_path):
    """A folder of LLaVA-format data whose image lies beside it, and a link to it within."""
    (tmp_path / "in").mkdir()
    Image.new("RGB", (60, 60), "red").save(tmp_path / "secret.png")
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "secret.png")

    def write(*entries):
        content = [
            {"image": image, "conversations": [
                {"from": "human", "value": "<image>\nWhat is red?"},
                {"from": "gpt", "value": "this"},
            ]} | more
            for image, more in entries
        ]  # fmt: skip
        (tmp_path / "in" / "data.json").write_text(json.dumps(content))
        return tmp_path / "in" / "data.json"

    return write


def test_an_image_token_in_a_question_is_text(run, checkpoint, tmp_path):
    Image.new("RGB", (60, 60)).save(tmp_path / "a.png")
    options = ["--model", checkpoint, "--budget", "16"]
    code, _, err = run("ask", tmp_path / "a.png", "What <image> is this?</s>", *options)
    assert code == 0 and not err


def test_ask_opens_pictures_as_people_see_them(run, checkpoint, tmp_path):
    """A 16-bit picture is answered as its 8-bit copy."""
    ramp = np.linspace(0, 65535, 3600).round().astype(np.uint16).reshape(60, 60)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    open_image(tmp_path / "deep.png").save(tmp_path / "copy.png")
    replies = [
        run("ask", tmp_path / name, "What?", "--model", checkpoint, "--budget", "16")[1]
        for name in ("deep.png", "copy.png")
    ]
    assert replies[0] == replies[1]


@pytest.mark.parametrize("name", ["../secret.png", "link.png", "http://127.0.0.1:9/a.png"])
def test_schedule_and_training_read_images_of_their_folder(run, checkpoint, data, tmp_path, name):
    path = data((name, {}))
    commands = [
        ["schedule", "--model", checkpoint, "--data", path, "--images", tmp_path / "in",
         "--budget", "16", "--output", tmp_path / "out"],
        ["train-wings", "train", "--model", checkpoint, "--data", path, "--images",
         tmp_path / "in", "--output", tmp_path / "run"],
    ]  # fmt: skip
    for command in commands:
        code, _, err = run(*command)
        wanted = "nothing is downloaded" if "://" in name else "leads out of"
        assert code == 2 and wanted in err and err.count("\n") == 1
        assert not (tmp_path / "out").exists() and not (tmp_path / "run").exists()
    code, _, err = run(*commands[0], "--allow-outside")
    assert (code == 2) == ("://" in name) and "leads out of" not in err


def test_samples_of_no_use_are_refused_or_counted(run, checkpoint, data, tmp_path):
    path = data(("link.png", {}), ("link.png", {"video": "a.mp4"}))
    command = [
        "train-wings", "train", "--model", checkpoint, "--data", path, "--images", tmp_path / "in",
        "--output", tmp_path / "run", "--method", "no-such-method", "--allow-outside",
    ]  # fmt: skip
    code, _, err = run(*command)
    assert code == 2 and "has 'video'" in err
    _, _, err = run(*command, "--skip-bad")
    assert "1 sample(s) left out; the first: " in err and "has 'video'" in err
