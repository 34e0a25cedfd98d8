"""Folders, manifests and CoOp splits, and what is said when they are wrong."""

import json
import os
import re

import pytest
from PIL import Image

from vlm_prune.continual.methods.zscl import ZSCL
from vlm_prune.continual.streams import csv_manifest, image_folder, read_coop_split
from vlm_prune.continual.streams.coop import coop_task
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.paths import DataRoot


def one_line(error, *words):
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_image_folder(folders):
    task = image_folder(folders, "pets")
    assert task.classes == ("big cat", "dog")
    assert [len(split) for split in (task.train, task.val, task.test)] == [8, 2, 4]
    image, label = task.train[5]
    assert isinstance(image, Image.Image) and image.mode == "RGB" and label == 1
    assert [label for _, label in task.test[1:3]] == [0, 1]


def test_image_folder_takes_other_names(folders):
    assert image_folder(folders, "pets", classes=("lynx", "hound")).classes == ("lynx", "hound")
    with pytest.raises(InputError) as error:
        image_folder(folders, "pets", classes=("lynx",))
    one_line(error, "2 folders", "1 class names")


def test_missing_root_says_where_to_put_images(tmp_path):
    with pytest.raises(InputError) as error:
        image_folder(tmp_path / "nowhere", "pets")
    one_line(error, str(tmp_path / "nowhere" / "train"), "{train,val,test}")


def test_class_names_that_clash(folders):
    for part in ("train", "val", "test"):
        os.rename(folders / part / "dog", folders / part / "big cat")
    with pytest.raises(InputError) as error:
        image_folder(folders, "pets")
    one_line(error, "'big cat'", "0 and 1", "rename")


def test_empty_class(folders):
    for path in (folders / "train" / "dog").iterdir():
        path.unlink()
    with pytest.raises(InputError) as error:
        image_folder(folders, "pets")
    one_line(error, str(folders / "train" / "dog"), "no image")


def test_classes_of_splits_differ(folders):
    (folders / "test" / "dog").rename(folders / "test" / "wolf")
    with pytest.raises(InputError) as error:
        image_folder(folders, "pets")
    one_line(error, "'dog'", "test")


def test_corrupt_image_is_named(folders):
    bad = folders / "train" / "dog" / "1.png"
    bad.write_bytes(bad.read_bytes()[:60])
    task = image_folder(folders, "pets")
    with pytest.raises(InputError) as error:
        for k in range(len(task.train)):
            task.train[k]
    one_line(error, str(bad))


def test_corrupt_image_is_left_out_only_when_asked(folders, caplog):
    bad = folders / "train" / "dog" / "1.png"
    bad.write_bytes(b"no image at all")
    task = image_folder(folders, "pets", skip_bad=True)
    assert len(task.train) == 7 and task.train.labels == [0] * 4 + [1] * 3
    assert str(bad) in caplog.text
    assert len([image for image, _ in task.train]) == 7


@pytest.mark.slow
def test_corrupt_image_among_100_000(folders):
    dogs = folders / "train" / "dog"
    for number in range(100_000):  # ext4 holds 65,000 links to a file
        os.link(dogs / f"{number % 4}.png", dogs / f"x{number:06}.png")
    bad = dogs / "x054321.png"
    bad.unlink()
    bad.write_bytes(b"no image at all")
    task = image_folder(folders, "pets")
    assert len(task.train) == 100_008
    with pytest.raises(InputError) as error:
        task.train[task.train.paths.index(bad)]
    one_line(error, str(bad))
    assert len(image_folder(folders, "pets", skip_bad=True).train) == 100_007


def manifest(folder, *rows, header="path,class,split"):
    file = folder / "list.csv"
    file.write_text("\n".join([header, *rows]) + "\n")
    return file


def test_csv_manifest(folders):
    rows = [f"train/dog/{k}.png,dog,train" for k in range(4)]
    rows += ["test/big_cat/0.png,big cat,test", "test/dog/0.png,dog,val"]
    task = csv_manifest(manifest(folders, *rows), "mine", templates=("{}",))
    assert task.classes == ("big cat", "dog")
    assert task.train.labels == [1] * 4 and task.val.labels == [1] and task.test.labels == [0]
    assert task.test[0][0].size == (8, 8)


@pytest.mark.parametrize(
    ("row", "header", "words"),
    [
        ("train/dog/0.png,dog,train", "path,label,split", ["'class'"]),
        ("train/dog/0.png,dog,training", "path,class,split", [":2", "'training'"]),
        ("train/dog/0.png, ,train", "path,class,split", [":2", "class is empty"]),
        ("train/dog/9.png,dog,train", "path,class,split", [":2", "9.png"]),
    ],
)
def test_csv_manifest_that_is_wrong(folders, row, header, words):
    with pytest.raises(InputError) as error:
        csv_manifest(manifest(folders, row, header=header), "mine")
    one_line(error, *words)


def coop_root(folders, folder="dtd", file="split_zhou_DescribableTextures.json", classes=47):
    """A copy of a CoOp data set with one image per class and split, all of them one file."""
    images = folders / folder / "images"
    images.parent.mkdir()
    (folders / "train" / "dog").rename(images)
    rows = [["0.png", label, f"very_class_{label}"] for label in range(classes)]
    (folders / folder / file).write_text(json.dumps(dict.fromkeys(("train", "val", "test"), rows)))
    return folders


def test_coop_split(folders):
    task = coop_task("dtd", coop_root(folders))
    assert len(task.classes) == 47 and task.classes[3] == "very class 3"
    assert task.templates == ("{} texture.",)
    image, label = task.test[46]
    assert image.size == (8, 8) and label == 46


def test_coop_split_accepts_either_folder(folders):
    name, classes = "split_zhou_Caltech101.json", 100
    assert (
        len(coop_task("caltech101", coop_root(folders, "caltech101", name, classes)).classes) == 100
    )
    (folders / "caltech101").rename(folders / "caltech-101")
    assert len(coop_task("caltech101", folders).classes) == 100


def test_coop_split_with_another_number_of_classes(folders):
    with pytest.raises(InputError) as error:
        coop_task("dtd", coop_root(folders, classes=46))
    one_line(error, "47", "46", "split file")


def test_missing_coop_data_say_what_to_put_where(tmp_path):
    with pytest.raises(InputError) as error:
        coop_task("pets", tmp_path)
    one_line(error, "split_zhou_OxfordPets.json", str(tmp_path / "oxford_pets"))


@pytest.mark.parametrize("text", ["{}", "[1]", '{"train": [[1]], "val": [], "test": []}', "{"])
def test_file_that_is_no_coop_split(tmp_path, text):
    file = tmp_path / "split.json"
    file.write_text(text)
    with pytest.raises(InputError, match=re.escape(str(file))):
        read_coop_split(file, tmp_path, "mine", ("{}",))


def test_coop_label_with_two_names(tmp_path):
    file = tmp_path / "split.json"
    file.write_text(json.dumps({"train": [["a", 0, "x"]], "val": [], "test": [["b", 0, "y"]]}))
    with pytest.raises(InputError, match="'x' and 'y'"):
        read_coop_split(file, tmp_path, "mine", ("{}",))


def test_official_aircraft_files(tmp_path, folders):
    from vlm_prune.continual.streams.names import table

    root = folders / "fgvc_aircraft"
    (root / "images").mkdir(parents=True)
    (folders / "train" / "dog" / "0.png").rename(root / "images" / "0001.jpg")
    names = table()["aircraft"].classes
    (root / "variants.txt").write_text("\n".join(names) + "\n")
    for part in ("train", "val", "test"):
        lines = "\n".join(f"0001 {name}" for name in names)
        (root / f"images_variant_{part}.txt").write_text(lines + "\n")
    task = coop_task("aircraft", folders)
    assert task.classes == names and task.train.labels == list(range(100))
    assert task.val[5][0].size == (8, 8)
    for line in ("0001", "0001 Concorde"):
        (root / "images_variant_val.txt").write_text(line + "\n")
        with pytest.raises(InputError) as error:
            coop_task("aircraft", folders)
        one_line(error, "images_variant_val.txt has", repr(line[5:]), "none of variants.txt")


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_manifest_may_start_with_a_byte_order_mark(folders, mark):
    rows = [f"{part}/dog/0.png,dog,{part}" for part in ("train", "val", "test")]
    task = csv_manifest(manifest(folders, *rows, header=f"{mark}path,class,split"), "mine")
    assert task.classes == ("dog",) and len(task.train) == 1


@pytest.mark.parametrize(
    "text", ["path,class,split\na.png\n", "path,class,split\n\x00\n", "path,class,split\n\xff\n"]
)
def test_broken_manifests_are_one_line(folders, text):
    (folders / "list.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError) as error:
        csv_manifest(folders / "list.csv", "mine")
    one_line(error, "list.csv")


@pytest.fixture
def outside(folders, tmp_path_factory):
    """A picture that is not below `folders`, and links to it and to its folder from there."""
    folder = tmp_path_factory.mktemp("outside")
    Image.new("RGB", (8, 8), "blue").save(folder / "secret.png")
    (folders / "train" / "dog" / "link.png").symlink_to(folder / "secret.png")
    (folders / "away").symlink_to(folder)
    return folder


def test_a_manifest_names_files_of_its_root(folders, outside):
    names = ["train/dog/link.png", "away/secret.png", f"../{outside.name}/secret.png"]
    for name in [*names, str(outside / "secret.png")]:
        path = manifest(folders, f"{name},dog,train", "test/dog/0.png,dog,test")
        with pytest.raises(InputError, match=r"list.csv:2: .*leads out of"):
            csv_manifest(path, "mine")
        with pytest.raises(InputError, match=r"list.csv:2: .*leads out of"):
            csv_manifest(path, "mine", root=folders)
        allowed = csv_manifest(path, "mine", root=DataRoot(folders, allow_outside=True))
        if not name.startswith(".."):
            assert allowed.train[0][0].getpixel((0, 0)) == (0, 0, 255)
    path = manifest(folders, "https://example.org/a.png,dog,train")
    with pytest.raises(InputError, match=r"list.csv:2: .*nothing is downloaded"):
        csv_manifest(path, "mine", root=DataRoot(folders, allow_outside=True))


def test_links_in_class_folders_stay_in_the_root(folders, outside):
    with pytest.raises(InputError, match=r"link.png' leads out of .*--allow-outside"):
        image_folder(folders, "pets")
    task = image_folder(DataRoot(folders, allow_outside=True), "pets")
    assert task.train[task.train.paths.index(folders / "train/dog/link.png")][0].size == (8, 8)
    with pytest.raises(InputError, match="leads out of"):
        ZSCL(images=folders)
    assert len(ZSCL(images=folders, allow_outside=True)._sources) == 15


def test_coop_splits_name_files_of_their_root(folders, outside):
    for name in ("train/dog/link.png", str(outside / "secret.png"), "http://h/a.png"):
        rows = {"train": [[name, 0, "dog"]], "val": [], "test": [["test/dog/0.png", 0, "dog"]]}
        (folders / "split.json").write_text(json.dumps(rows))
        with pytest.raises(InputError, match="leads out of|nothing is downloaded"):
            read_coop_split(folders / "split.json", folders, "mine", ("{}",))
    root = coop_root(folders)
    (root / "dtd" / "images").rename(root / "elsewhere")
    (root / "dtd" / "images").symlink_to(outside)
    with pytest.raises(InputError, match="leads out of"):
        coop_task("dtd", root)
