"""Splits whose images lie in files: opened when asked for, so that a split costs only its paths."""

import csv
from collections.abc import Sequence
from pathlib import Path

from vlm_prune.continual.streams.base import Labeled, LabeledImages, StreamTask, readable_indices
from vlm_prune.vlm.common.errors import InputError, first_line
from vlm_prune.vlm.common.images import open_image
from vlm_prune.vlm.common.paths import DataRoot

SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}
PHOTO = ("a photo of a {}.",)


class Files(LabeledImages):
    """Image files with labels.

    Args:
        paths: of the images.
        labels: one per path.
        skip_bad: open every image now and leave out those that cannot be read, each named in a
            warning. Otherwise asking for such an image raises `InputError` with its name.
    """

    def __init__(
        self, paths: Sequence[Path], labels: Sequence[int], skip_bad: bool = False
    ) -> None:
        self.paths, self.labels = list(paths), list(labels)
        if skip_bad:
            good = readable_indices(self)
            self.paths = [self.paths[k] for k in good]
            self.labels = [self.labels[k] for k in good]

    def __len__(self) -> int:
        return len(self.paths)

    def item(self, index: int) -> Labeled:
        return open_image(self.paths[index]), self.labels[index]


def image_folder(
    root: Path | DataRoot,
    name: str,
    templates: tuple[str, ...] = PHOTO,
    classes: Sequence[str] | None = None,
    skip_bad: bool = False,
) -> StreamTask:
    """Returns a task of `root/{train,val,test}/<class>/*.jpg`; classes are folder names, `_` read
    as a space.

    `val` may be missing, and is then empty.

    Args:
        root: the folder of the data set.
        name: of the task.
        templates: prompts with one `{}` each.
        classes: names in place of the folders', in the order of the sorted folders.
        skip_bad: leave out images that cannot be read.

    Raises:
        InputError: if `root`, `train` or `test` is missing, the splits' classes differ, a class
            has no image, two folders give one name, or a link leads out of `root`.
    """
    data, root = DataRoot.of(root), DataRoot.of(root).folder
    missing = [part for part in ("train", "test") if not (root / part).is_dir()]
    if missing:
        raise InputError(
            f"{root / missing[0]} is not a folder; put images at {root}/{{train,val,test}}/<class>/"
        )
    folders = {part: list_classes(root / part) for part in ("train", "val", "test")}
    class_folders = folders["train"]
    for part, names in folders.items():
        if names != class_folders and (root / part).is_dir():
            odd = min(set(names) ^ set(class_folders))
            raise InputError(f"class {odd!r} of {name} is not in both train and {part}; give both")
    splits = [
        folder_split(data.below(part), class_folders, skip_bad)
        if (root / part).is_dir()
        else Files([], [])
        for part in folders
    ]
    chosen = (
        tuple(classes) if classes else tuple(folder.replace("_", " ") for folder in class_folders)
    )
    if len(chosen) != len(class_folders):
        raise InputError(
            f"{name} has {len(class_folders)} folders but {len(chosen)} class names; give as many"
        )
    return StreamTask(name, chosen, templates, *splits)


def list_classes(folder: Path) -> list[str]:
    """Returns the names of the class folders, sorted."""
    return sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []


def folder_split(root: Path | DataRoot, classes: Sequence[str], skip_bad: bool = False) -> Files:
    """Returns the images of one split's class folders, sorted.

    Args:
        root: the split's folder.
        classes: its folders, by label.
        skip_bad: leave out images that cannot be read.

    Raises:
        InputError: if a class has no image, or a link leads out of the root.
    """
    root = DataRoot.of(root)
    folder = root.folder
    paths, labels = list[Path](), list[int]()
    for label, name in enumerate(classes):
        found = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in SUFFIXES)
        if not found:
            raise InputError(f"class folder {folder / name} has no image; add some or remove it")
        paths += [root.path(path.relative_to(folder)) for path in found]
        labels += [label] * len(found)
    return Files(paths, labels, skip_bad)


def csv_manifest(
    manifest: Path,
    name: str,
    templates: tuple[str, ...] = PHOTO,
    root: Path | DataRoot | None = None,
    skip_bad: bool = False,
) -> StreamTask:
    """Returns a task from a CSV file with the columns `path`, `class` and `split` (train, val or
    test).

    Classes are labeled in sorted order.

    Args:
        manifest: the file.
        name: of the task.
        templates: prompts with one `{}` each.
        root: folder that paths are relative to and must not leave; None is the manifest's own.
        skip_bad: leave out images that cannot be read.

    Raises:
        InputError: if the file or a column is missing, a row has an empty class or an unknown
            split, or a file of the list is not there or outside of the root.
    """
    if not manifest.is_file():
        raise InputError(f"{manifest} is not a file; give a CSV with columns path,class,split")
    try:
        with manifest.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="")
            lacking = {"path", "class", "split"} - set(reader.fieldnames or ())
            rows = list(reader)
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"cannot read {manifest}: {first_line(error)}") from error
    if lacking:
        raise InputError(f"{manifest} has no column {min(lacking)!r}; it needs path,class,split")
    base = DataRoot.of(manifest.parent if root is None else root)
    classes = tuple(sorted({row["class"] for row in rows}))
    numbers = {text: label for label, text in enumerate(classes)}
    parts: dict[str, tuple[list[Path], list[int]]] = {p: ([], []) for p in ("train", "val", "test")}
    for line, row in enumerate(rows, 2):
        if row["split"] not in parts:
            raise InputError(f"{manifest}:{line}: split {row['split']!r}; use train, val or test")
        if not row["class"].strip():
            raise InputError(f"{manifest}:{line}: the class is empty; give every row a class")
        try:
            path = base.path(row["path"])
        except InputError as error:
            raise InputError(f"{manifest}:{line}: {error}") from None
        if not path.is_file():
            raise InputError(f"{manifest}:{line}: {path} is not a file; mend the path or the root")
        parts[row["split"]][0].append(path)
        parts[row["split"]][1].append(numbers[row["class"]])
    train, val, test = (Files(*parts[part], skip_bad) for part in ("train", "val", "test"))
    return StreamTask(name, classes, templates, train, val, test)
