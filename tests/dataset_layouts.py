"""Small copies of the streams' data sets in their published layouts, one picture linked many times."""

import json
import os
import pickle
from hashlib import md5

import numpy as np
from PIL import Image
from scipy.io import savemat

from vlm_prune.continual.streams.coop import LAYOUT, x_tail_classes
from vlm_prune.continual.streams.names import table


class Root:
    """A data root; `add` puts the picture at a path."""

    def __init__(self, root):
        self.root = root
        self.picture = root / "picture.jpg"
        pixels = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
        Image.fromarray(pixels).save(self.picture)

    def add(self, path):
        self.make(path)
        if not (self.root / path).exists():
            os.link(self.picture, self.root / path)

    def make(self, path):
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        return self.root / path

    def text(self, path, lines):
        self.make(path).write_text("\n".join(lines) + "\n")


def names(key):
    return list(table()[key].classes)


def aircraft(root, folder):
    root.text(f"{folder}/variants.txt", names("aircraft"))
    for part in ("train", "val", "test"):
        root.text(f"{folder}/images_variant_{part}.txt", [f"0001 {n}" for n in names("aircraft")])
    root.add(f"{folder}/images/0001.jpg")


def mnist(root):
    """Ten pictures per split, in the IDX format."""
    for part in ("train", "t10k"):
        head = b"".join(n.to_bytes(4, "big") for n in (2051, 10, 28, 28))
        images = root.make(f"MNIST/raw/{part}-images-idx3-ubyte")
        images.write_bytes(head + bytes(range(10)) * 784)
        labels = root.make(f"MNIST/raw/{part}-labels-idx1-ubyte")
        labels.write_bytes((2049).to_bytes(4, "big") + (10).to_bytes(4, "big") + bytes(range(10)))


def x_tail_root(folder):
    """CoOp's layout, with one picture per class and split, and torchvision's MNIST."""
    root = Root(folder)
    aircraft(root, "fgvc_aircraft")
    mnist(root)
    for key, ((first, *_), file, images) in LAYOUT.items():
        root.add(f"{first}/{images}/0.jpg")
        rows = [["0.jpg", n, name] for n, name in enumerate(names(key)[: x_tail_classes(key)])]
        splits = dict.fromkeys(("train", "val", "test"), rows)
        (root.root / first / file).write_text(json.dumps(splits))
    return folder


def cifar100(root, monkeypatch):
    """Pickles, whose sums torchvision checks: it is told those of these."""
    from torchvision.datasets import CIFAR100

    spelled = [name.replace(" ", "_") for name in names("cifar100")]
    rows = {"data": np.zeros((100, 3072), np.uint8), "fine_labels": list(range(100))}
    sums = {}
    for file, entry in (("train", rows), ("test", rows), ("meta", {"fine_label_names": spelled})):
        path = root.make(f"cifar-100-python/{file}")
        path.write_bytes(pickle.dumps(entry))
        sums[file] = md5(path.read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", CIFAR100.meta | {"md5": sums["meta"]})


CIFAR100_NAMES = [name.replace(" ", "_") for name in names("cifar100")]
PER_CLASS = {"train": 2, "test": 1}


def cifar100_pixels(part):
    """Images (n, 32, 32, 3) and labels of a split, in an order that is not that of the labels."""
    rng = np.random.default_rng(len(part))
    labels = rng.permutation(np.repeat(np.arange(100), PER_CLASS[part]))
    return rng.integers(0, 256, (len(labels), 32, 32, 3), np.uint8), labels


def cifar100_binary(folder):
    """The binary version, with two training images and one test image of each class."""
    below = folder / "cifar-100-binary"
    below.mkdir()
    (below / "fine_label_names.txt").write_text("\n".join(CIFAR100_NAMES) + "\n")
    for part in PER_CLASS:
        rows = (
            bytes([0, label]) + image.transpose(2, 0, 1).tobytes()
            for image, label in zip(*cifar100_pixels(part), strict=True)
        )
        (below / f"{part}.bin").write_bytes(b"".join(rows))
    return folder


def places365(root, monkeypatch):
    """365 categories of which two share their last part, and one picture of each."""
    from torchvision.datasets import Places365

    places = [*(f"/k/kind_{n}" for n in range(363)), "/a/gate/indoor", "/b/bar/indoor"]
    root.text("places365/categories_places365.txt", [f"{p} {n}" for n, p in enumerate(places)])
    root.text("places365/places365_val.txt", [f"0.jpg {n}" for n in range(365)])
    root.add("places365/val_256/0.jpg")
    sums = {}
    for file in ("categories_places365.txt", "places365_val.txt"):
        sums[file] = md5((root.root / "places365" / file).read_bytes()).hexdigest()
    meta = tuple(sums.items())
    monkeypatch.setattr(Places365, "_CATEGORIES_META", meta[0])
    monkeypatch.setattr(Places365, "_FILE_LIST_META", {"val": meta[1]})


def imagenet(root):
    for number in range(1000):
        root.add(f"imagenet/val/n{number:08}/0.jpg")


def flowers(root, monkeypatch):
    from torchvision.datasets import Flowers102

    numbers = np.arange(1, 103)
    for number in numbers:
        root.add(f"flowers-102/jpg/image_{number:05}.jpg")
    savemat(root.make("flowers-102/imagelabels.mat"), {"labels": numbers})
    savemat(root.make("flowers-102/setid.mat"), dict.fromkeys(("trnid", "valid", "tstid"), numbers))
    files = {
        kind: (file, md5((root.root / "flowers-102" / file).read_bytes()).hexdigest())
        for kind, file in (("label", "imagelabels.mat"), ("setid", "setid.mat"))
    }
    monkeypatch.setattr(Flowers102, "_file_dict", files)


def cars(root):
    rows = np.array(
        [(f"{n:05}.jpg", n) for n in range(1, 197)], dtype=[("fname", object), ("class", object)]
    )
    for part in ("train", "test"):
        for name, _ in rows:
            root.add(f"stanford_cars/cars_{part}/{name}")
    files = ("devkit/cars_train_annos.mat", "cars_test_annos_withlabels.mat")
    for file in files:
        savemat(root.make(f"stanford_cars/{file}"), {"annotations": rows})
    classes = np.array(names("cars"), dtype=object)
    savemat(root.make("stanford_cars/devkit/cars_meta.mat"), {"class_names": classes})


def mtil_root(folder, monkeypatch):
    """torchvision's eleven layouts, with one picture per class, two where splits are drawn."""
    root = Root(folder)
    aircraft(root, "fgvc-aircraft-2013b/data")
    mnist(root)
    cifar100(root, monkeypatch)
    flowers(root, monkeypatch)
    cars(root)
    for name in ("BACKGROUND_Google", *(f"kind_{n:03}" for n in range(101))):
        for number in (1, 2):
            root.add(f"caltech101/101_ObjectCategories/{name}/image_{number:04}.jpg")
    for number in range(20):
        root.add(f"eurosat/2750/land_{number % 10}/{number}.jpg")
    for name in names("dtd"):
        root.add(f"dtd/dtd/images/{name}/{name}_1.jpg")
    for part in ("train", "val", "test"):
        root.text(f"dtd/dtd/labels/{part}1.txt", [f"{n}/{n}_1.jpg" for n in names("dtd")])
    dishes = [name.replace(" ", "_") for name in names("food101")]
    for name in dishes:
        root.add(f"food-101/images/{name}/1.jpg")
    for part in ("train", "test"):
        root.text(
            f"food-101/meta/{part}.json", [json.dumps({name: [f"{name}/1"] for name in dishes})]
        )
    breeds = [name.replace(" ", "_") for name in names("pets")]
    for name in breeds:
        root.add(f"oxford-iiit-pet/images/{name}_1.jpg")
    for part in ("trainval", "test"):
        rows = [f"{name}_1 {n} 1 1" for n, name in enumerate(breeds, 1)]
        root.text(f"oxford-iiit-pet/annotations/{part}.txt", rows)
    places = [name.replace(" ", "_") for name in names("sun397")]
    root.text("SUN397/ClassName.txt", [f"/{name[0]}/{name}" for name in places])
    for name in places:
        for number in (1, 2):
            root.add(f"SUN397/{name[0]}/{name}/sun_{number}.jpg")
    return folder
