"""The training script on the published streams, in their layouts on disk, and on wrong input."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from dataset_layouts import (
    Root,
    cifar100,
    cifar100_binary,
    imagenet,
    mtil_root,
    places365,
    x_tail_root,
)
from open_clip.model import CLIP

from vlm_prune.continual.clip import from_open_clip, load_clip
from vlm_prune.continual.streams.benchmarks import ORDER_1, ORDER_2, X_TAIL
from vlm_prune.continual.streams.torchvision_sets import torchvision_task
from vlm_prune.continual.streams.unseen import UNSEEN
from vlm_prune.vlm.common.errors import InputError

SCRIPT = Path(__file__).parents[3] / "scripts" / "train_continual.py"
VISION = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of a random CLIP."""
    torch.manual_seed(0)
    config = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}
    tokenize = open_clip.SimpleTokenizer(context_length=16)
    folder = tmp_path_factory.mktemp("clip")
    from_open_clip(CLIP(**config), tokenize, config).save(folder)
    return folder


@pytest.fixture
def run(monkeypatch, capsys, tmp_path, model):
    """Run the script in `tmp_path / "run"`; returns its exit code and output."""

    def script(*arguments):
        given = ["--output", tmp_path / "run", "--model", model, "--recipe", "steps=1,batch=2"]
        given += ["--options", "rank=2", *arguments]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, given)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        captured = capsys.readouterr()
        return end.value.code, captured.out, captured.err

    return script


def report_of(tmp_path, model):
    """The report of a run, whose model must have the keys of the one it began with."""
    base, final = (
        load_clip(str(f)).model.state_dict() for f in (model, tmp_path / "run" / "model")
    )
    assert list(base) == list(final)
    return json.loads((tmp_path / "run" / "report.json").read_text())


@pytest.mark.slow
def test_x_tail_end_to_end(run, model, tmp_path, monkeypatch):
    root = Root(x_tail_root(tmp_path))
    cifar100(root, monkeypatch)
    places365(root, monkeypatch)
    code, out, err = run("--stream", "x-tail", "--data-root", tmp_path, "--shots", "1")
    assert code == 0, err
    report = report_of(tmp_path, model)
    assert report["tasks"] == list(X_TAIL) and sum(report["test_images"]) == 1100
    assert np.array(report["accuracy"]).shape == (10, 10) and len(report["drift"]) == 10
    assert list(report["retention"]) == ["cifar100", "places365", "imagenet"]
    assert "1000 n... folders" in report["retention"]["imagenet"]["missing"]
    assert "retention on places365: " in out
    drawn = json.loads((tmp_path / "run" / "indices.json").read_text())["train"]
    assert {name: len(indices) for name, indices in drawn.items()}["sun397"] == 397


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stream", "order", "method", "options"),
    [
        ("mtil-1", ORDER_1, "full", "encoder=vision"),
        ("mtil-2", ORDER_2, "zero-shot", ""),
    ],
)
def test_mtil_end_to_end(stream, order, method, options, run, model, tmp_path, monkeypatch):
    root = mtil_root(tmp_path, monkeypatch)
    arguments = ("--stream", stream, "--data-root", root, "--method", method)
    code, _, err = run(*arguments, "--options", options)
    assert code == 0, err
    report = report_of(tmp_path, model)
    assert report["tasks"] == list(order) and np.array(report["accuracy"]).shape == (11, 11)
    assert (report["drift"][-1] > 0) == (method == "full")
    assert "missing" in report["retention"]["places365"]


@pytest.mark.slow
def test_the_class_incremental_stream_end_to_end(run, model, tmp_path):
    root = cifar100_binary(tmp_path)
    arguments = ("--stream", "cifar100-10", "--data-root", root, "--method", "rail")
    code, out, err = run(*arguments, "--options", "width=8")
    assert code == 0, err
    report = report_of(tmp_path, model)
    assert report["tasks"] == [f"step-{n}" for n in range(1, 11)]
    accuracy = np.array(report["accuracy"])
    assert accuracy.shape == (10, 10) and report["recipe"]["seen_only"]
    seen = np.mean([accuracy[t, : t + 1].mean() for t in range(10)])
    assert report["metrics"]["incremental"]["value"] == pytest.approx(seen)
    assert "incremental " in out


@pytest.mark.slow
def test_unseen_data_sets_are_read_by_name(tmp_path, monkeypatch):
    root = Root(tmp_path)
    cifar100(root, monkeypatch)
    places365(root, monkeypatch)
    imagenet(root)
    for name, classes in {"cifar100": 100, "places365": 365, "imagenet": 1000}.items():
        task = UNSEEN[name](tmp_path)
        assert (task.name, len(task.classes), len(task.test)) == (name, classes, classes)
        assert task.test[3][1] == 3 and task.test[3][0].mode == "RGB"
    assert {"gate indoor", "bar indoor"} < set(UNSEEN["places365"](tmp_path).classes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shots", "0"], "0 shots leave aircraft without training images; give 1 or more"),
        ([], "has 1 training images for 16 shots; give fewer shots"),
        (["--shots", "1", "--retention", "cifar10"], "did you mean 'cifar100'"),
        (["--shots", "1", "--retention", "cifar100"], "cifar100 is not under"),
        (["--shots", "1", "--retention", "sun397"], "sun397 is a task of x-tail"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(arguments, message, run, tmp_path):
    code, _, err = run("--stream", "x-tail", "--data-root", x_tail_root(tmp_path), *arguments)
    assert code == 2 and err.startswith("Error: ") and err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "run").exists()


def test_a_data_root_that_lacks_a_data_set_says_what_to_put_where(run, tmp_path):
    folder = x_tail_root(tmp_path)
    (folder / "oxford_pets" / "split_zhou_OxfordPets.json").unlink()
    code, _, err = run("--stream", "x-tail", "--data-root", folder, "--shots", "1")
    assert code == 2 and err.count("\n") == 1
    assert f"split_zhou_OxfordPets.json into {folder / 'oxford_pets'}" in err


def test_bad_images_are_named_and_left_out_only_when_asked(tmp_path, monkeypatch, caplog):
    folder = mtil_root(tmp_path, monkeypatch)
    bad = folder / "oxford-iiit-pet" / "images" / "Abyssinian_1.jpg"
    bad.unlink()
    bad.write_bytes((folder / "picture.jpg").read_bytes()[:200])
    task = torchvision_task("pets", folder)
    with pytest.raises(InputError) as error:
        task.train[0]
    assert str(bad) in str(error.value) and "\n" not in str(error.value)
    left = torchvision_task("pets", folder, skip_bad=True)
    assert (len(task.train), len(left.train), len(left.test)) == (37, 36, 36)
    assert str(bad) in caplog.text


def test_incomplete_layouts_are_one_line(tmp_path, monkeypatch):
    folder = mtil_root(tmp_path, monkeypatch)
    shutil.rmtree(folder / "caltech101" / "101_ObjectCategories" / "BACKGROUND_Google")
    with pytest.raises(InputError, match="BACKGROUND_Google is missing"):
        torchvision_task("caltech101", folder)
    (folder / "oxford-iiit-pet" / "annotations" / "test.txt").write_text("Abyssinian_1 1\n")
    with pytest.raises(InputError, match="pets under .* is incomplete") as error:
        torchvision_task("pets", folder)
    assert "\n" not in str(error.value)


def test_places_are_cut_in_the_order_of_their_names(tmp_path, monkeypatch):
    whole = torchvision_task("sun397", mtil_root(tmp_path, monkeypatch)).train.split
    files = [str(path) for path in whole.data._image_files]
    assert files == sorted(files) and len(files) == 2 * 397
    assert whole.data.classes[whole.labels[0]] in files[0]
