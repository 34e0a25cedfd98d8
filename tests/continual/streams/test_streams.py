"""Tables, torchvision layouts, streams and shots."""

import json
from dataclasses import replace

import numpy as np
import pytest
from dataset_layouts import mtil_root
from PIL import Image

from vlm_prune.continual.streams import STREAMS, few_shot, open_stream, write_indices
from vlm_prune.continual.streams.base import StreamTask
from vlm_prune.continual.streams.benchmarks import ORDER_1, ORDER_2, X_TAIL
from vlm_prune.continual.streams.coop import x_tail_classes
from vlm_prune.continual.streams.names import in_own_order, table
from vlm_prune.continual.streams.packaged import task as packaged_task
from vlm_prune.continual.streams.stream import Stream, Subset
from vlm_prune.continual.streams.torchvision_sets import SETS, torchvision_task
from vlm_prune.continual.streams.unseen import imagenet, imagenet_names, place_name, places365
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.paths import DataRoot

COUNTS = {
    "aircraft": 100, "caltech101": 101, "cifar100": 100, "dtd": 47, "eurosat": 10, "flowers": 102,
    "food101": 101, "mnist": 10, "pets": 37, "cars": 196, "sun397": 397,
}  # fmt: skip


def test_the_tables_have_1201_and_1100_classes():
    assert {key: len(set(names.classes)) for key, names in table().items()} == COUNTS
    assert sum(len(table()[key].classes) for key in ORDER_1) == 1201
    assert sorted(ORDER_1) == sorted(ORDER_2) == sorted(COUNTS) == sorted(SETS)
    assert len(X_TAIL) == 10 and sum(map(x_tail_classes, X_TAIL)) == 1100
    for names in table().values():
        assert all(t.count("{}") == 1 for t in (*names.templates, names.x_tail))
    assert [len(table()[key].templates) for key in ("caltech101", "cifar100")] == [34, 18]


def test_names_follow_the_copy_of_the_data():
    own = sorted(name.replace(" ", "_").upper() for name in table()["cifar100"].classes)[::-1]
    names = in_own_order("cifar100", own)
    assert names[0] == "worm" and names[-1] == "apple"
    with pytest.raises(InputError, match="99"):
        in_own_order("cifar100", own[1:])
    with pytest.raises(InputError, match="'TIGERS'"):
        in_own_order("cifar100", ["TIGERS", *own[1:]])


def test_caltech_faces_follow_the_order_of_the_folders():
    # the published names of the folders Faces, Faces_easy, Leopards, Motorbikes, accordion
    assert table()["caltech101"].classes[:5] == (
        "off-center face", "centered face", "leopard", "motorbike", "accordion",
    )  # fmt: skip


def test_torchvision_eurosat_is_cut_once_and_for_all(tmp_path):
    folders = (
        "AnnualCrop Forest HerbaceousVegetation Highway Industrial Pasture PermanentCrop "
        "Residential River SeaLake"
    )
    for name in folders.split():
        for number in range(5):
            path = tmp_path / "eurosat" / "2750" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4), (number, 0, 0)).save(path)
    task = torchvision_task("eurosat", tmp_path)
    assert task.classes[2] == "brushland or shrubland" and len(task.templates) == 3
    assert (len(task.train), len(task.val), len(task.test)) == (40, 0, 10)
    assert not set(task.train.indices) & set(task.test.indices)
    assert task.train.indices == torchvision_task("eurosat", tmp_path).train.indices
    image, label = task.train[0]
    assert image.size == (4, 4) and label == task.train.labels[0]
    shots = few_shot(task, 2)
    assert np.bincount(shots.train.labels).tolist() == [2] * 10


@pytest.mark.parametrize("key", list(SETS))
def test_missing_torchvision_data_say_what_to_put_where(tmp_path, key):
    with pytest.raises(InputError, match="nothing is downloaded") as error:
        torchvision_task(key, tmp_path)
    assert SETS[key][1][0] in str(error.value) and list(tmp_path.iterdir()) == []


@pytest.fixture
def layouts(tmp_path, monkeypatch):
    return mtil_root(tmp_path, monkeypatch)


@pytest.mark.parametrize("key", list(SETS))
def test_incomplete_torchvision_data_name_the_file_that_is_missing(layouts, key):
    """StanfordCars' devkit without its .mat, and whatever else may be gone."""
    torchvision_task(key, layouts)
    for name in SETS[key][1]:
        (layouts / name).rename(layouts / "gone")
        with pytest.raises(InputError, match="nothing is downloaded") as error:
            torchvision_task(key, layouts)
        assert f"{layouts / name} is missing" in str(error.value)
        (layouts / "gone").rename(layouts / name)


@pytest.mark.parametrize("key", [key for key in SETS if key not in ("cifar100", "mnist")])
def test_links_of_torchvision_data_stay_in_the_root(layouts, key, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "secret.jpg"
    Image.new("RGB", (4, 4), "blue").save(outside)
    first = torchvision_task(key, layouts).train
    path = (first.split if isinstance(first, Subset) else first).paths[0]
    path.unlink()
    path.symlink_to(outside)
    with pytest.raises(InputError, match=r"leads out of .*--allow-outside"):
        torchvision_task(key, layouts)
    allowed = torchvision_task(key, DataRoot(layouts, allow_outside=True))
    held = allowed.train.split if isinstance(allowed.train, Subset) else allowed.train
    image, _ = held[held.paths.index(path)]
    assert image.getpixel((0, 0))[2] > 200


def test_torchvision_images_open_as_every_picture_does(layouts):
    """Turned by EXIF, which torchvision does not look at."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = torchvision_task("dtd", layouts).train.paths[0]
    path.unlink()
    Image.new("RGB", (8, 4)).save(path, exif=exif)
    assert torchvision_task("dtd", layouts).train[0][0].size == (4, 8)


def test_streams_by_name(tmp_path):
    published = ["mtil-1", "mtil-2", "mtil-5shot", "x-tail", "cifar100-10"]
    assert list(STREAMS) == ["packaged", "redrawn", *published]
    with pytest.raises(InputError, match="did you mean 'x-tail'"):
        open_stream("xtail")
    with pytest.raises(InputError, match="data root"):
        open_stream("x-tail", tmp_path / "nowhere")
    with pytest.raises(InputError, match="aircraft"):
        open_stream("mtil-1", tmp_path)


def labeled(counts, name="mine"):
    split = [(Image.new("RGB", (1, 1)), label) for label, n in enumerate(counts) for _ in range(n)]
    return StreamTask(
        name, tuple(f"c{k}" for k in range(len(counts))), ("{}",), split, split, split
    )


def test_shots_depend_on_seed_and_data_set_alone():
    task = labeled([20, 30])
    drawn = few_shot(task, 4, seed=1).train.indices
    assert drawn == few_shot(task, 4, seed=1).train.indices
    assert drawn != few_shot(task, 4, seed=2).train.indices
    assert drawn != few_shot(labeled([20, 30], "other"), 4, seed=1).train.indices
    assert len(set(drawn)) == 8 and sum(k < 20 for k in drawn) == 4


@pytest.mark.parametrize("shots", [0, -3])
def test_no_shots(shots):
    with pytest.raises(InputError, match="give 1 or more"):
        few_shot(labeled([3]), shots)


def test_fewer_images_than_shots():
    task = labeled([20, 3])
    with pytest.raises(InputError, match="class 'c1' of mine has 3 training images for 16 shots"):
        few_shot(task, 16)
    repeated = few_shot(task, 16, repeat=True).train
    assert np.bincount(repeated.labels).tolist() == [16, 16]
    assert set(repeated.indices[16:]) == {20, 21, 22}
    with pytest.raises(InputError, match="add some images"):
        few_shot(labeled([20, 0]), 16, repeat=True)


def test_indices_are_published(tmp_path):
    stream = Stream("s", (few_shot(labeled([5, 5]), 2),), joint=True, ensemble=False)
    write_indices(stream, tmp_path / "shots.json")
    written = json.loads((tmp_path / "shots.json").read_text())
    assert written == {"stream": "s", "train": {"mine": list(stream.tasks[0].train.indices)}}
    with pytest.raises(InputError, match="no shots"):
        write_indices(Stream("s", (labeled([5]),), True, False), tmp_path / "none.json")


def test_a_stream_counts_its_classes_and_finds_equal_prompts():
    one, two = labeled([1, 1]), replace(labeled([1, 1, 1], "two"), classes=("c1", "x", "y"))
    stream = Stream("s", (one, two), joint=True, ensemble=False)
    assert stream.classes == 5 and stream.ambiguous() == ["c1"]
    with pytest.raises(InputError, match="two tasks are named 'mine'"):
        Stream("s", (one, one), True, False)
    with pytest.raises(InputError, match="no tasks"):
        Stream("s", (), True, False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"classes": ()}, "no classes"),
        ({"classes": ("a", " ")}, "class 1 of digits has an empty name"),
        ({"classes": ("a", "b", "a")}, "both named 'a'"),
        ({"templates": ()}, "no prompt template"),
        ({"templates": ("a {} and a {}",)}, "exactly one {}"),
    ],
)
def test_tasks_that_are_wrong(change, words):
    with pytest.raises(InputError, match=words.replace("{", r"\{").replace("}", r"\}")):
        replace(packaged_task("digits"), **change)


def test_places_keep_their_full_name(tmp_path):
    assert place_name("/a/airport_terminal") == "airport terminal"
    assert place_name("/a/apartment_building/outdoor") == "apartment building outdoor"
    with pytest.raises(InputError, match=r"categories_places365\.txt"):
        places365(tmp_path)


def test_imagenet_names_are_all_different(tmp_path):
    names = imagenet_names()
    assert len(names) == len(set(names)) == 1000 and names[0] == "tench"
    assert (names[657], names[837]) == ("missile", "sunglasses")
    for number in range(3):
        (tmp_path / "val" / f"n{number}").mkdir(parents=True)
    with pytest.raises(InputError, match="3 class folders"):
        imagenet(tmp_path)
