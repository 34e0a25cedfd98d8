"""Data sets with CoOp's splits: a folder with images and `split_zhou_<Name>.json`.

The file holds {train, val, test: [[path, label, class name], ...]}; class names are the file's
own, with `_` read as a space, and their number is checked against the packaged table.
"""

from pathlib import Path

from vlm_prune.continual.streams.base import StreamTask
from vlm_prune.continual.streams.files import Files
from vlm_prune.continual.streams.names import table
from vlm_prune.continual.streams.torchvision_sets import torchvision_task
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.files import read_object
from vlm_prune.vlm.common.paths import DataRoot

# folder names in use, the split file, and the folder of the images
LAYOUT: dict[str, tuple[tuple[str, ...], str, str]] = {
    "caltech101": (
        ("caltech-101", "caltech101"), "split_zhou_Caltech101.json", "101_ObjectCategories",
    ),
    "dtd": (("dtd",), "split_zhou_DescribableTextures.json", "images"),
    "eurosat": (("eurosat",), "split_zhou_EuroSAT.json", "2750"),
    "flowers": (("oxford_flowers", "flowers-102"), "split_zhou_OxfordFlowers.json", "jpg"),
    "food101": (("food-101", "food101"), "split_zhou_Food101.json", "images"),
    "pets": (("oxford_pets", "oxford-iiit-pet"), "split_zhou_OxfordPets.json", "images"),
    "cars": (("stanford_cars",), "split_zhou_StanfordCars.json", "."),
    "sun397": (("sun397", "SUN397"), "split_zhou_SUN397.json", "SUN397"),
}  # fmt: skip
AIRCRAFT = ("fgvc_aircraft", "fgvc-aircraft-2013b/data")


def x_tail_classes(key: str) -> int:
    """Returns how many classes a data set has in X-TAIL, where Caltech101
    has one kind of face, not two.
    """
    return len(table()[key].classes) - (key == "caltech101")


def coop_task(key: str, root: Path | DataRoot, skip_bad: bool = False) -> StreamTask:
    """Returns one of X-TAIL's ten data sets, with its one template.

    Aircraft uses its official text files, MNIST torchvision's full test set and no `val`; the
    others CoOp's JSON.

    Args:
        key: of the data set.
        root: folder of the data sets.
        skip_bad: leave out images that cannot be read.

    Raises:
        InputError: if the data set is unknown, not under `root`, or has another number of classes.
    """
    template, root = (table()[key].x_tail,), DataRoot.of(root)
    if key == "mnist":
        digits = torchvision_task("mnist", root, skip_bad)
        return StreamTask(key, digits.classes, template, digits.train, digits.val, digits.test)
    if key == "aircraft":
        task = _aircraft(root, template, skip_bad)
    else:
        if key not in LAYOUT:
            raise InputError(f"{key} has no CoOp split; it is no part of X-TAIL")
        folders, file, images = LAYOUT[key]
        data = _first(root, folders, file, key)
        inner = data.below(images) if (data.folder / images).is_dir() else data
        task = read_coop_split(data.path(file), inner, key, template, skip_bad)
    if len(task.classes) != x_tail_classes(key):
        raise InputError(
            f"{key} has {x_tail_classes(key)} classes in X-TAIL but {len(task.classes)} here; "
            "get the published split file"
        )
    return task


def read_coop_split(
    file: Path,
    images: Path | DataRoot,
    name: str,
    templates: tuple[str, ...],
    skip_bad: bool = False,
) -> StreamTask:
    """Returns a task from any JSON file in CoOp's format.

    Args:
        file: `split_zhou_<Name>.json` or another one in its format.
        images: folder that its paths are relative to and must not leave.
        name: of the task.
        templates: prompts with one `{}` each.
        skip_bad: leave out images that cannot be read.

    Raises:
        InputError: if the file is missing or not in that format, a label has two names, or a path
            leads out of the folder.
    """
    if not file.is_file():
        raise InputError(f"{file} is missing; put CoOp's split file there")
    rows, root, named = read_object(file), DataRoot.of(images), dict[int, str]()
    files = dict[str, list[Path]](train=[], val=[], test=[])
    try:
        for part, paths in files.items():
            for path, label, text in rows[part]:
                clean = str(text).replace("_", " ")
                if named.setdefault(int(label), clean) != clean:
                    raise InputError(
                        f"{file}: label {label} is both {named[int(label)]!r} and {clean!r}"
                    )
                paths.append(root.path(str(path)))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{file} is not a CoOp split; it needs train, val, test: [[path, label, class], ...]"
        ) from error
    if sorted(named) != list(range(len(named))):
        raise InputError(f"{file}: labels must be 0 to {len(named) - 1} without a gap")
    splits = [
        Files(paths, [int(row[1]) for row in rows[part]], skip_bad) for part, paths in files.items()
    ]
    return StreamTask(name, tuple(named[label] for label in range(len(named))), templates, *splits)


def _aircraft(root: DataRoot, templates: tuple[str, ...], skip_bad: bool) -> StreamTask:
    """Returns FGVC-Aircraft with its official splits.

    Args:
        root: folder of the data sets.
        templates: of prompts.
        skip_bad: leave out images that cannot be read.
    """
    data = _first(root, AIRCRAFT, "variants.txt", "aircraft")
    folder = data.folder
    classes = tuple(line.strip() for line in (folder / "variants.txt").read_text().splitlines())
    numbers = {name: label for label, name in enumerate(classes)}
    splits = []
    for part in ("train", "val", "test"):
        file = folder / f"images_variant_{part}.txt"
        if not file.is_file():
            raise InputError(f"{file} is missing; put FGVC-Aircraft's official files there")
        lines = [line.partition(" ") for line in file.read_text().splitlines() if line.strip()]
        paths = [data.path(f"images/{number}.jpg") for number, _, _ in lines]
        try:
            labels = [numbers[name.strip()] for _, _, name in lines]
        except KeyError as error:
            raise InputError(f"{file} has {error}, which is none of variants.txt") from None
        splits.append(Files(paths, labels, skip_bad))
    return StreamTask("aircraft", classes, templates, *splits)


def _first(root: DataRoot, folders: tuple[str, ...], file: str, key: str) -> DataRoot:
    """Returns the first of the folders in use that holds `file`.

    Args:
        root: folder of the data sets.
        folders: names in use, the preferred one first.
        file: that the data set must have.
        key: name of the data set, for the message.

    Raises:
        InputError: if none does.
    """
    top = root.folder
    for folder in folders:
        if (top / folder / file).is_file():
            return root.below(folder)
    raise InputError(
        f"{key} is not under {top}: put its images and {file} into {top / folders[0]} "
        "(nothing is downloaded)"
    )
