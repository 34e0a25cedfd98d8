"""Splits whose images lie in files: opened when asked for, so that a split costs only its paths."""

import csv
from collections.abc import Sequence
from pathlib import Path

from vlm_prune.continual.streams.base import Labelled, LabelledImages, Task, readable
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.images import open_image

SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}
PHOTO = ("a photo of a {}.",)


class Files(LabelledImages):
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
            good = readable(self)
            self.paths = [self.paths[k] for k in good]
            self.labels = [self.labels[k] for k in good]

    def __len__(self) -> int:
        return len(self.paths)

    def item(self, index: int) -> Labelled:
        return open_image(self.paths[index]), self.labels[index]


def image_folder(
    root: Path,
    name: str,
    templates: tuple[str, ...] = PHOTO,
    classes: Sequence[str] | None = None,
    skip_bad: bool = False,
) -> Task:
    """Returns a task of `root/{train,val,test}/<class>/*.jpg`; classes are folder names, `_` read
    as a space.

    Args:
        root: folder of the splits; `val` may be missing, and is then empty.
        name: of the task.
        templates: class prompts with `{}` for the name.
        classes: replaces the names, in the order of the sorted folders.
        skip_bad: whether images that cannot be read are left out, each named in a warning.
    """
    missing = [part for part in ("train", "test") if not (root / part).is_dir()]
    if missing:
        raise InputError(
            f"{root / missing[0]} is not a folder; put images at {root}/{{train,val,test}}/<class>/"
        )
    folders = {part: list_classes(root / part) for part in ("train", "val", "test")}
    own = folders["train"]
    for part, names in folders.items():
        if names != own and (root / part).is_dir():
            odd = min(set(names) ^ set(own))
            raise InputError(f"class {odd!r} of {name} is not in both train and {part}; give both")
    splits = [
        folder_split(root / part, own, skip_bad) if (root / part).is_dir() else Files([], [])
        for part in folders
    ]
    chosen = tuple(classes) if classes else tuple(folder.replace("_", " ") for folder in own)
    if len(chosen) != len(own):
        raise InputError(
            f"{name} has {len(own)} folders but {len(chosen)} class names; give as many"
        )
    return Task(name, chosen, templates, *splits)


def list_classes(folder: Path) -> list[str]:
    """Names of the class folders, sorted."""
    return sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []


def folder_split(folder: Path, classes: Sequence[str], skip_bad: bool = False) -> Files:
    """Returns the images of one split's class folders, sorted.

    Args:
        folder: of the split.
        classes: its folders.
        skip_bad: as for `Files`.
    """
    paths, labels = list[Path](), list[int]()
    for label, name in enumerate(classes):
        found = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in SUFFIXES)
        if not found:
            raise InputError(f"class folder {folder / name} has no image; add some or remove it")
        paths += found
        labels += [label] * len(found)
    return Files(paths, labels, skip_bad)


def csv_manifest(
    manifest: Path,
    name: str,
    templates: tuple[str, ...] = PHOTO,
    root: Path | None = None,
    skip_bad: bool = False,
) -> Task:
    """Returns a task from a CSV file with the columns `path`, `class` and `split` (train, val or
    test).

    Args:
        manifest: the file; its classes are labeled in sorted order.
        name: of the task.
        templates: class prompts with `{}` for the name.
        root: folder that paths are relative to, by default the manifest's.
        skip_bad: as for `Files`.
    """
    if not manifest.is_file():
        raise InputError(f"{manifest} is not a file; give a CSV with columns path,class,split")
    with manifest.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        lacking = {"path", "class", "split"} - set(reader.fieldnames or ())
        if lacking:
            raise InputError(
                f"{manifest} has no column {min(lacking)!r}; it needs path,class,split"
            )
        rows = list(reader)
    base = manifest.parent if root is None else root
    classes = tuple(sorted({row["class"] or "" for row in rows}))
    numbers = {text: label for label, text in enumerate(classes)}
    parts: dict[str, tuple[list[Path], list[int]]] = {p: ([], []) for p in ("train", "val", "test")}
    for line, row in enumerate(rows, 2):
        if row["split"] not in parts:
            raise InputError(f"{manifest}:{line}: split {row['split']!r}; use train, val or test")
        if not (row["class"] or "").strip():
            raise InputError(f"{manifest}:{line}: the class is empty; give every row a class")
        path = base / row["path"]
        if not path.is_file():
            raise InputError(f"{manifest}:{line}: {path} is not a file; mend the path or the root")
        parts[row["split"]][0].append(path)
        parts[row["split"]][1].append(numbers[row["class"]])
    train, val, test = (Files(*parts[part], skip_bad) for part in ("train", "val", "test"))
    return Task(name, classes, templates, train, val, test)
