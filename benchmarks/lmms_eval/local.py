"""Copies of data sets on this machine: Parquet or JSON files in the schema of the Hub."""

import json
import re
from pathlib import Path
from typing import Any

from vlm_prune.vlm.common.errors import InputError, first_line

KINDS = ("parquet", "jsonl", "json")


def folder_of(root: Path, dataset: str) -> Path | None:
    """Where below `root` a data set of the Hub lies: `org/name`, or `name` in any case."""
    if not root.is_dir():
        raise InputError(f"--data-root {root} is no folder")
    if (root / dataset).is_dir():
        return root / dataset
    name = dataset.split("/")[-1].lower()
    return next((p for p in sorted(root.iterdir()) if p.is_dir() and p.name.lower() == name), None)


def load_split(folder: Path, config: str | None, split: str) -> Any:
    """One split as a `datasets.Dataset`.

    Files are `[config/][data/]<split>-00000-of-00003*.parquet`, `<split>.parquet`, `.json`,
    `.jsonl`, or `<config>` with these endings. In JSON, `image` is a file's path, seen from the folder.

    Raises:
        InputError: if there is no such file, or one is missing, damaged or half downloaded.
    """
    import datasets

    files = _files(folder, config, split)
    if not files:
        shown = f"{config + '/' if config else ''}{split}-*.parquet, {split}.json or .jsonl"
        raise InputError(f"{folder} holds no split {split!r}: expected {shown}")
    _check_shards(files)
    try:
        if files[0].suffix == ".parquet":
            tables = [datasets.Dataset.from_parquet(str(file)) for file in files]
            return datasets.concatenate_datasets(tables)
        rows = [row for file in files for row in _rows(file, folder)]
        table = datasets.Dataset.from_list(rows)
    except InputError:
        raise
    except Exception as error:  # pyarrow, datasets and json each raise their own
        raise InputError(
            f"{files[0].parent} is damaged or half downloaded ({first_line(error)}); download it again"
        ) from error
    return table.cast_column("image", datasets.Image()) if "image" in table.features else table


def _files(folder: Path, config: str | None, split: str) -> list[Path]:
    places = [folder / config, folder] if config else [folder]
    named = [_matching(folder, config)] if config else []
    found = [_matching(place / inner, split) for place in places for inner in ("", "data")]
    return next((files for files in [*found, *named] if files), [])


def _matching(folder: Path, split: str) -> list[Path]:
    """The files of a split, of the first kind that there are."""
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


def _rows(file: Path, folder: Path) -> list[dict[str, Any]]:
    """Rows of a JSON list, of an object of rows by id, or one a line."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".jsonl":
        content: Any = [json.loads(line) for line in text.splitlines() if line.strip()]
    else:
        content = json.loads(text)
    if isinstance(content, dict):
        content = [{"id": key, **row} for key, row in content.items()]
    rows: list[dict[str, Any]] = content
    for row in rows:
        if isinstance(row.get("image"), str):
            path = folder / row["image"]
            if not path.is_file():
                raise InputError(f"{file} names the image {path}, which is not there")
            row["image"] = str(path)
    return rows
