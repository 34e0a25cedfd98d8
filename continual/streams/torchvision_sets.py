"""Data sets in torchvision's folder layout, with the packaged class names; nothing is downloaded."""

import importlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from vlm_prune.continual.streams.base import Labeled, LabeledImages, StreamTask, readable_indices
from vlm_prune.continual.streams.cifar import LAYOUTS, cifar100_copy
from vlm_prune.continual.streams.names import in_own_order, table
from vlm_prune.continual.streams.stream import Subset
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.images import open_image
from vlm_prune.vlm.common.paths import DataRoot

# class in torchvision.datasets, what must be there under the root, and each split's arguments
SETS: dict[str, tuple[str, tuple[str, ...], dict[str, dict[str, Any]]]] = {
    "aircraft": (
        "FGVCAircraft",
        ("fgvc-aircraft-2013b/data", "fgvc-aircraft-2013b/data/variants.txt"),
        {part: {"split": part} for part in ("train", "val", "test")},
    ),
    # torchvision leaves this folder out, and fails without it
    "caltech101": (
        "Caltech101", ("caltech101/101_ObjectCategories/BACKGROUND_Google",), {"all": {}}
    ),
    "cifar100": (
        "CIFAR100",
        ("cifar-100-python", *(f"cifar-100-python/{part}" for part in ("train", "test", "meta"))),
        {"train": {"train": True}, "test": {"train": False}},
    ),
    "dtd": (
        "DTD",
        ("dtd/dtd/images", *(f"dtd/dtd/labels/{part}1.txt" for part in ("train", "val", "test"))),
        {part: {"split": part} for part in ("train", "val", "test")},
    ),
    "eurosat": ("EuroSAT", ("eurosat/2750",), {"all": {}}),
    "flowers": (
        "Flowers102",
        ("flowers-102/jpg", "flowers-102/imagelabels.mat", "flowers-102/setid.mat"),
        {part: {"split": part} for part in ("train", "val", "test")},
    ),
    "food101": (
        "Food101",
        ("food-101/images", "food-101/meta/train.json", "food-101/meta/test.json"),
        {part: {"split": part} for part in ("train", "test")},
    ),
    "mnist": (
        "MNIST",
        (
            "MNIST/raw",
            *(
                f"MNIST/raw/{part}-{kind}-ubyte"
                for part in ("train", "t10k")
                for kind in ("images-idx3", "labels-idx1")
            ),
        ),
        {"train": {"train": True}, "test": {"train": False}},
    ),
    "pets": (
        "OxfordIIITPet",
        (
            "oxford-iiit-pet/images",
            "oxford-iiit-pet/annotations/trainval.txt",
            "oxford-iiit-pet/annotations/test.txt",
        ),
        {"train": {"split": "trainval"}, "test": {"split": "test"}},
    ),
    "cars": (
        "StanfordCars",
        (
            "stanford_cars/devkit",
            "stanford_cars/devkit/cars_meta.mat",
            "stanford_cars/devkit/cars_train_annos.mat",
            "stanford_cars/cars_test_annos_withlabels.mat",
            "stanford_cars/cars_train",
            "stanford_cars/cars_test",
        ),
        {part: {"split": part} for part in ("train", "test")},
    ),
    "sun397": ("SUN397", ("SUN397/ClassName.txt",), {"all": {}}),
}  # fmt: skip
SPLIT_SEED = 42
TRAIN_SHARE = 0.8


class TorchvisionSplit(LabeledImages):
    """A torchvision data set as a sequence of RGB images and labels.

    Args:
        data: the data set; image files are opened by our own function, not by torchvision's.
        name: for messages.
        root: folder that its files must lie in.

    Raises:
        InputError: if a file leads out of it.
    """

    def __init__(self, data: Any, name: str, root: DataRoot) -> None:
        self.data, self.name = data, name
        files = getattr(data, "_image_files", None)
        if files is not None:
            # SUN397 lists its files in the order of the file system
            order = sorted(range(len(files)), key=lambda k: str(files[k]))
            data._image_files = [files[k] for k in order]
            data._labels = [data._labels[k] for k in order]
        self.paths = [root.path(path.absolute()) for path in _paths(data)]

    @cached_property
    def labels(self) -> list[int]:
        """Returns the labels without opening an image, wherever torchvision keeps them."""
        for attribute in ("targets", "_labels", "y"):
            if hasattr(self.data, attribute):
                return [int(label) for label in getattr(self.data, attribute)]
        if hasattr(self.data, "_samples"):
            return [int(label) for _, label in self.data._samples]
        return [label for _, label in self]

    def __len__(self) -> int:
        return len(self.data)

    def item(self, index: int) -> Labeled:
        file = f" ({self.paths[index]})" if self.paths else ""
        try:
            if self.paths:
                return open_image(self.paths[index]), self.labels[index]
            image, label = self.data[index]
            return open_image(image), int(label)
        except (OSError, SyntaxError, InputError) as error:
            raise InputError(
                f"image {index} of {self.name}{file} cannot be read: {error}"
            ) from error


def _paths(data: Any) -> list[Path]:
    """Returns the image files of a torchvision data set, in its order;
    none where images are arrays.
    """
    for attribute in ("_image_files", "_images", "_samples", "samples", "imgs"):
        if hasattr(data, attribute):
            entries = getattr(data, attribute)
            return [Path(entry[0] if isinstance(entry, tuple) else entry) for entry in entries]
    if hasattr(data, "categories") and hasattr(data, "index"):  # Caltech101 has a rule for them
        folder = Path(data.root) / "101_ObjectCategories"
        pairs = zip(data.y, data.index, strict=True)
        return [folder / data.categories[y] / f"image_{n:04d}.jpg" for y, n in pairs]
    return []


def torchvision_task(key: str, root: Path | DataRoot, skip_bad: bool = False) -> StreamTask:
    """Returns one of MTIL's eleven data sets as ZSCL splits it.

    Official splits where there are any; `train` without `val` for aircraft, dtd and flowers, and
    `trainval` for pets. Caltech101, EuroSAT and SUN397 have none and are cut 80 : 20 by a
    generator of seed 42. `val` is empty where there is no official one. CIFAR-100 may also be the binary
    version, the Hub's Parquet files or folders of images; the files of its Python version are
    pickles, which torchvision reads after checking their sums.

    Args:
        key: of the data set.
        root: folder of the data sets.
        skip_bad: leave out images that cannot be read.

    Raises:
        InputError: if `key` is unknown, the data are not under `root`, or the classes differ from
            the packaged table.
    """
    names, root = table()[key], DataRoot.of(root)
    copy = cifar100_copy(root) if key == "cifar100" else None
    splits: dict[str, Sequence[Labeled]]
    if copy is not None:
        splits, given = {"train": copy.train, "test": copy.test}, copy.names or names.classes
    else:
        opened = _open(key, root.folder)
        splits = {part: TorchvisionSplit(data, key, root) for part, data in opened.items()}
        some = next(iter(opened.values()))
        given = getattr(some, "categories", None) or getattr(some, "classes", None) or names.classes
    classes = in_own_order(key, given)
    parts: dict[str, Sequence[Labeled]] = {"val": (), **splits}
    if "all" in splits:
        whole = splits["all"]
        generator = torch.Generator().manual_seed(SPLIT_SEED)
        order = torch.randperm(len(whole), generator=generator).tolist()
        cut = int(TRAIN_SHARE * len(whole))
        parts |= {"train": Subset(whole, order[:cut]), "test": Subset(whole, order[cut:])}
    train, val, test = (parts[part] for part in ("train", "val", "test"))
    if skip_bad:
        train, val, test = (Subset(s, readable_indices(s)) for s in (train, val, test))
    return StreamTask(key, classes, names.templates, train, val, test)


def torchvision_class(name: str) -> Any:
    """Returns a class of `torchvision.datasets`."""
    try:
        return getattr(importlib.import_module("torchvision.datasets"), name)
    except ImportError:
        raise InputError("this needs torchvision: pip install 'vlm-prune[clip]'") from None


def _open(key: str, root: Path) -> dict[str, Any]:
    kind, needed, parts = SETS[key]
    lost = next((name for name in needed if not (root / name).exists()), None)
    if lost is not None:
        raise InputError(
            f"{key} is not under {root}: {root / lost} is missing; put torchvision's {kind} "
            f"layout{f', {LAYOUTS}' if key == 'cifar100' else ''} there (nothing is downloaded)"
        )
    cls = torchvision_class(kind)
    try:
        return {part: cls(str(root), **options) for part, options in parts.items()}
    except (RuntimeError, OSError, ValueError, LookupError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].split(". ")[0].strip()
        raise InputError(
            f"{key} under {root} is incomplete for torchvision's {kind}: {reason}"
        ) from error
