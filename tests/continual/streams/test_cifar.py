"""CIFAR-100 in the layouts people have, and its class-incremental stream."""

import pickle
from dataclasses import replace

import datasets
import numpy as np
import pytest
from dataset_layouts import CIFAR100_NAMES as NAMES
from dataset_layouts import PER_CLASS, cifar100_binary, cifar100_pixels
from PIL import Image

from vlm_prune.continual.streams import class_increments, open_stream
from vlm_prune.continual.streams.names import table
from vlm_prune.continual.streams.stream import labels_of
from vlm_prune.continual.streams.torchvision_sets import torchvision_task
from vlm_prune.vlm.common.errors import InputError


def write_parquet(root, below="cifar100", shards=2):
    features = datasets.Features(
        {"img": datasets.Image(), "fine_label": datasets.ClassLabel(names=NAMES)}
    )
    for part in PER_CLASS:
        images, labels = cifar100_pixels(part)
        rows = {"img": [Image.fromarray(image) for image in images], "fine_label": labels.tolist()}
        whole = datasets.Dataset.from_dict(rows, features)
        (root / "cifar100" / below).mkdir(parents=True, exist_ok=True)
        for shard in range(shards):
            name = f"{part}-{shard:05}-of-{shards:05}.parquet"
            whole.shard(shards, shard).to_parquet(root / "cifar100" / below / name)


def write_folders(root):
    for part in PER_CLASS:
        for number, (image, label) in enumerate(zip(*cifar100_pixels(part), strict=True)):
            folder = root / "cifar100" / part / NAMES[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{number:04}.png")


WRITERS = {"binary": cifar100_binary, "parquet": write_parquet, "folders": write_folders}


@pytest.mark.parametrize("layout", WRITERS)
def test_each_layout_has_the_same_images_and_labels(layout, tmp_path):
    WRITERS[layout](tmp_path)
    task = torchvision_task("cifar100", tmp_path)
    assert task.classes == table()["cifar100"].classes and len(task.val) == 0
    for part, split in (("train", task.train), ("test", task.test)):
        images, labels = cifar100_pixels(part)
        wanted = sorted((int(k), i.tobytes()) for i, k in zip(images, labels, strict=True))
        found = sorted((label, np.array(image).tobytes()) for image, label in split)
        assert found == wanted
        assert labels_of(split) == [label for _, label in split]


def test_the_stream_is_ten_steps_in_the_order_of_seed_1993(tmp_path):
    cifar100_binary(tmp_path)
    stream = open_stream("cifar100-10", tmp_path)
    assert [len(task.classes) for task in stream.tasks] == [10] * 10
    assert stream.joint and stream.seen_only and not stream.ensemble
    # the first classes that class-incremental papers train on
    first = [68, 56, 78, 8, 23, 84, 90, 65, 74, 76]
    assert list(stream.tasks[0].classes) == [NAMES[k].replace("_", " ") for k in first]
    assert sorted(name for task in stream.tasks for name in task.classes) == sorted(
        table()["cifar100"].classes
    )
    images, labels = cifar100_pixels("train")
    of_label = {image.tobytes(): int(label) for image, label in zip(images, labels, strict=True)}
    for task in stream.tasks:
        assert len(task.train) == 20 and labels_of(task.train) == [k for _, k in task.train]
        for image, label in task.train:
            name = NAMES[of_label[np.array(image).tobytes()]].replace("_", " ")
            assert task.classes[label] == name
    few = open_stream("cifar100-10", tmp_path, shots=1)
    assert [len(task.train) for task in few.tasks] == [10] * 10


def test_the_python_version_is_not_unpickled_unless_it_is_the_published_file(tmp_path):
    marker = tmp_path / "marker"

    class Evil:
        def __reduce__(self):
            return (marker.write_text, ("ran",))

    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for part in ("train", "test", "meta"):
        (folder / part).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(InputError, match="cifar100 under"):
        open_stream("cifar100-10", tmp_path)
    assert not marker.exists()
    cifar100_binary(tmp_path)
    assert len(open_stream("cifar100-10", tmp_path).tasks) == 10
    assert not marker.exists()


def cut(root):
    path = root / "cifar-100-binary" / "train.bin"
    path.write_bytes(path.read_bytes()[:-1])


def other_label(root):
    path = root / "cifar-100-binary" / "test.bin"
    content = bytearray(path.read_bytes())
    content[1] = 200
    path.write_bytes(bytes(content))


def no_names(root):
    (root / "cifar-100-binary" / "fine_label_names.txt").unlink()


def no_test(root):
    for path in (root / "cifar100").rglob("test-*"):
        path.unlink()


def damaged(root):
    path = next((root / "cifar100").rglob("train-00000*"))
    path.write_bytes(path.read_bytes()[:500])


def other_columns(root):
    rows = datasets.Dataset.from_dict({"text": ["a"], "label": [1]})
    for part in PER_CLASS:
        for path in (root / "cifar100").rglob(f"{part}-*"):
            rows.to_parquet(path)


@pytest.mark.parametrize(
    ("layout", "break_it", "message"),
    [
        (None, None, r"cifar-100-python is missing; put .* or cifar100/\{train,test\}/<class>/"),
        ("binary", cut, r"train.bin has \d+ bytes, and an image has 3074"),
        ("binary", other_label, r"test.bin has no labels from 0 to 99"),
        ("binary", no_names, "cannot read .*fine_label_names.txt"),
        ("parquet", no_test, r"no test-\*.parquet beside"),
        ("parquet", damaged, "cannot read .*train-00000-of-00002.parquet"),
        ("parquet", other_columns, "columns text, label; it needs img or image"),
    ],
)
def test_copies_that_are_wrong_are_one_line(layout, break_it, message, tmp_path):
    if layout is not None:
        WRITERS[layout](tmp_path)
        break_it(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        open_stream("cifar100-10", tmp_path)
    assert "\n" not in str(caught.value)


def test_files_of_the_copy_stay_in_the_root(tmp_path):
    outside, root = tmp_path / "outside", tmp_path / "root"
    for folder in (outside, root):
        folder.mkdir()
    write_parquet(outside, "data")
    (root / "cifar100").mkdir()
    for path in (outside / "cifar100").rglob("*.parquet"):
        (root / "cifar100" / path.name).symlink_to(path)
    with pytest.raises(InputError, match="leads out of"):
        open_stream("cifar100-10", root)


def test_steps_and_orders_that_do_not_fit(tmp_path):
    cifar100_binary(tmp_path)
    task = torchvision_task("cifar100", tmp_path)
    with pytest.raises(InputError, match="100 classes of cifar100 cannot be learned in 7 equal"):
        class_increments(task, 7)
    with pytest.raises(InputError, match="names each label from 0 to 99 once"):
        class_increments(task, 10, [0] * 100)
    own = replace(task, classes=task.classes[::-1])
    assert class_increments(own, 50)[0].classes == own.classes[:2]
