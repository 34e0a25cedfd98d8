"""Copies of data sets on this machine: Parquet or JSON files in the schema of the Hub."""

import json
import re
from pathlib import Path
from typing import Any

from vlm_prune.vlm.common.errors import InputError, first_line
from vlm_prune.vlm.common.paths import DataRoot

KINDS = ("parquet", "jsonl", "json")


def folder_of(root: DataRoot, dataset: str) -> DataRoot | None:
    """Returns where below `root` a data set of the Hub lies: `org/name`, or `name` in any case.

    Raises:
        InputError: if `root` is no folder, or that of the data set is a link that leads out of it.
    """
    folder = root.folder
    if not folder.is_dir():
        raise InputError(f"--data-root {folder} is no folder")
    name = dataset.split("/")[-1].lower()
    found = next(
        (p.name for p in sorted(folder.iterdir()) if p.is_dir() and p.name.lower() == name), None
    )
    found = dataset if (folder / dataset).is_dir() else found
    if found is None:
        return None
    root.path(found)
    return root.below(found)


def load_split(root: DataRoot, config: str | None, split: str) -> Any:
    """Returns one split as a `datasets.Dataset`; its images are opened as `row_images` says.

    Files are `[config/][data/]<split>-00000-of-00003*.parquet`, `<split>.parquet`, `.json`,
    `.jsonl`, or `[json/]<config>` with these endings. In JSON, `image` is a file's path or a list of them,
    seen from the folder, and all values stay what the file says.

    Args:
        root: the folder of the data set.
        config: its configuration, where it has several.
        split: such as `test`.

    Raises:
        InputError: if there is no such file, or one is missing, damaged or half downloaded, or
            leads
            out of the root.
    """
    import datasets

    from vlm_prune.benchmarks.lmms_eval.rows import dataset_of_rows, row_images

    folder = root.folder
    files = _files(folder, config, split)
    if not files:
        shown = f"{config + '/' if config else ''}{split}-*.parquet, {split}.json or .jsonl"
        raise InputError(f"{folder} holds no split {split!r}: expected {shown}")
    _check_shards(files)
    for file in files:
        root.path(file.relative_to(folder))
    try:
        if files[0].suffix == ".parquet":
            tables = [datasets.Dataset.from_parquet(str(file)) for file in files]
            table = datasets.concatenate_datasets(tables)
        else:
            table = dataset_of_rows([row for file in files for row in _rows(file, root)])
        return row_images(table, root)
    except InputError:
        raise
    except Exception as error:  # pyarrow, datasets and json each raise their own
        raise InputError(
            f"{files[0].parent} is damaged or half downloaded ({first_line(error)}); download it again"
        ) from error


def _files(folder: Path, config: str | None, split: str) -> list[Path]:
    """Returns the files of a split, or of a configuration that is one; empty where there are none.

    Args:
        folder: of the data set.
        config: name of the configuration, or None.
        split: name of the split.
    """
    candidates = [folder / config, folder] if config else [folder]
    named = [_matching(folder / inner, config) for inner in ("", "json")] if config else []
    found = [
        _matching(candidate / inner, split) for candidate in candidates for inner in ("", "data")
    ]
    if config is None:
        # the only configuration, by whatever name
        inner = [_matching(below, split) for below in sorted(folder.iterdir()) if below.is_dir()]
        held = [files for files in inner if files]
        found += held if len(held) == 1 else []
    return next((files for files in [*found, *named] if files), [])


def _matching(folder: Path, split: str) -> list[Path]:
    """Returns the files of a split, of the first kind that there are."""
    for kind in KINDS:
        pattern = re.compile(rf"{re.escape(split)}(-[\w.-]+)?\.{kind}")
        found = [p for p in folder.glob(f"*.{kind}") if pattern.fullmatch(p.name)]
        if found:
            return sorted(found)
    return []


def _check_shards(files: list[Path]) -> None:
    counts = [re.search(r"-(\d{5})-of-(\d{5})", file.name) for file in files]
    found = {int(match[1]) for match in counts if match}
    wanted = max((int(match[2]) for match in counts if match), default=0)
    missing = sorted(set(range(wanted)) - found)
    if missing:
        raise InputError(
            f"{files[0].parent} holds {len(found)} of {wanted} files, number {missing[0]:05d} is "
            "missing; download it again"
        )


def _rows(file: Path, root: DataRoot) -> list[dict[str, Any]]:
    """Reads rows of a JSON list, of an object of rows by id, or one a line;
    names of images are checked.
    """
    if not file.is_file():
        raise InputError(f"{file} is no regular file")
    text = file.read_text(encoding="utf-8-sig")
    if file.suffix == ".jsonl":
        content: Any = [json.loads(line) for line in text.split("\n") if line.strip()]
    else:
        content = json.loads(text)
    if isinstance(content, dict):
        content = [{"id": key, **row} for key, row in content.items()]
    for number, row in enumerate(content):
        if not isinstance(row, dict):
            raise InputError(f"{file}, row {number}, is no JSON object")
        images = row.get("image")
        for name in images if isinstance(images, list) else [images]:
            if isinstance(name, str) and not root.path(name).is_file():
                raise InputError(f"{file} names the image {root.path(name)}, which is not there")
    return list(content)
