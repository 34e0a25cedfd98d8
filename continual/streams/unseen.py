"""Data sets that belong to no stream, to measure what a stream makes a CLIP forget.

Each is a task whose `train` and `val` are empty, scored against its own classes alone with
"a photo of a {}.", before and after the stream with the same prompts.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from vlm_prune.continual.clip import extra
from vlm_prune.continual.streams.base import StreamTask
from vlm_prune.continual.streams.files import PHOTO, folder_split, list_classes
from vlm_prune.continual.streams.packaged import task as packaged_task
from vlm_prune.continual.streams.torchvision_sets import (
    TorchvisionSplit,
    torchvision_class,
    torchvision_task,
)
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.paths import DataRoot
from vlm_prune.vlm.common.registry import Registry


def unseen_scenes() -> StreamTask:
    """Returns colored shapes, all known to the embedded CLIP; the
    packaged stream has none of them.
    """
    return replace(packaged_task("scenes"), train=(), val=())


def cifar100(root: Path | DataRoot) -> StreamTask:
    """Returns CIFAR-100's test images in torchvision's layout."""
    return replace(torchvision_task("cifar100", root), templates=PHOTO, train=(), val=())


def places365(root: Path | DataRoot, small: bool = True) -> StreamTask:
    """Returns Places365's validation images in torchvision's layout, under the full category names.

    `/a/apartment_building/outdoor` is "apartment building outdoor": the last part alone would give
    many categories one name.

    Raises:
        InputError: if the files are not under `root`.
    """
    root = DataRoot.of(root)
    try:
        data = torchvision_class("Places365")(str(root.folder), split="val", small=small)
    except (RuntimeError, OSError, ValueError) as error:
        needed = "categories_places365.txt, places365_val.txt and val_256/"
        raise InputError(f"Places365 is not under {root.folder}; put {needed} there") from error
    # torchvision sorts its list of classes; labels are the file's own numbers
    by_label = sorted(data.class_to_idx, key=data.class_to_idx.__getitem__)
    names = tuple(place_name(category) for category in by_label)
    if len(names) != 365:
        raise InputError(f"Places365 has 365 categories but {len(names)} here; get the full list")
    return StreamTask("places365", names, PHOTO, (), (), TorchvisionSplit(data, "places365", root))


def place_name(category: str) -> str:
    """Turns a category into words: `/a/airport_terminal` becomes `airport terminal`."""
    return category[3:].replace("/", " ").replace("_", " ").strip()


def imagenet(root: Path | DataRoot) -> StreamTask:
    """Returns ImageNet-1k's validation images in 1,000 folders named by
    WordNet id, `root/val/n01440764/`.

    Names are open_clip's. It calls two pairs of classes alike; the WordNet lemmas `projectile`
    and `sunglass` tell them apart.

    Raises:
        InputError: if there are not 1,000 folders, or one has no image.
    """
    root = DataRoot.of(root)
    data = root.below("val") if (root.folder / "val").is_dir() else root
    folder, ids = data.folder, list_classes(data.folder)
    if len(ids) != 1000 or not all(name.startswith("n") for name in ids):
        raise InputError(
            f"{folder} has {len(ids)} class folders; put ImageNet's 1000 n... folders there"
        )
    return StreamTask("imagenet", imagenet_names(), PHOTO, (), (), folder_split(data, ids))


def imagenet_names() -> tuple[str, ...]:
    """Returns 1,000 different names in the order of the WordNet ids."""
    names = list(extra("open_clip").IMAGENET_CLASSNAMES)
    names[744], names[836] = "projectile", "sunglass"
    return tuple(names)


UNSEEN: Registry[Callable[[DataRoot], StreamTask]] = Registry(
    "unseen data set",
    {
        "scenes": lambda root: unseen_scenes(),
        "cifar100": cifar100,
        "places365": lambda root: places365(root.below("places365")),
        "imagenet": lambda root: imagenet(root.below("imagenet")),
    },
)
