"""Local copies of CIFAR-100 that are read without running code, which its Python version's pickles can."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_prune.continual.clip import extra
from vlm_prune.continual.streams.base import Labeled, LabeledImages
from vlm_prune.continual.streams.files import image_folder
from vlm_prune.vlm.common.errors import InputError, first_line
from vlm_prune.vlm.common.images import open_image
from vlm_prune.vlm.common.paths import DataRoot

BINARY, FOLDER, NAMES = "cifar-100-binary", "cifar100", "fine_label_names.txt"
LAYOUTS = (
    f"{BINARY}/, {FOLDER}/**/train-*.parquet as on the Hub, or {FOLDER}/{{train,test}}/<class>/"
)
RECORD, SIDE, CLASSES = 2 + 3 * 32 * 32, 32, 100
LABELS, PICTURES = ("fine_label", "label"), ("img", "image")


@dataclass(frozen=True)
class Cifar100Copy:
    """A copy's splits, and its class names by label; None where it does not tell them."""

    train: Sequence[Labeled]
    test: Sequence[Labeled]
    names: tuple[str, ...] | None


def cifar100_copy(root: Path | DataRoot) -> Cifar100Copy | None:
    """Returns the copy of CIFAR-100 below a folder; None if there is none in one of these layouts.

    It is the binary version in `cifar-100-binary`, or in `cifar100` the Parquet files of the Hub, at
    any depth, or folders of images by class.

    Args:
        root: folder of the data sets.

    Raises:
        InputError: if a file of the copy is missing or damaged, or leads out of the root.
    """
    root = DataRoot.of(root)
    if (root.folder / BINARY).is_dir():
        return _binary_copy(root.below(BINARY))
    data = root.below(FOLDER)
    files = {part: _parquet_files(data, part) for part in ("train", "test")}
    if files["train"]:
        if not files["test"]:
            raise InputError(f"there is no test-*.parquet beside {files['train'][0]}")
        train, test = (PackedImages(files[part]) for part in ("train", "test"))
        return Cifar100Copy(train, test, train.names)
    if (data.folder / "train").is_dir():
        task = image_folder(data, "cifar100")
        return Cifar100Copy(task.train, task.test, task.classes)
    return None


def _parquet_files(data: DataRoot, part: str) -> list[Path]:
    found = sorted(data.folder.rglob(f"{part}-*.parquet"))
    return [data.path(path.relative_to(data.folder)) for path in found]


def _binary_copy(data: DataRoot) -> Cifar100Copy:
    names = data.path(NAMES)
    try:
        given = tuple(names.read_text(encoding="utf-8").split())
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {names}: {first_line(error)}") from error
    train, test = (BinaryImages(data.path(f"{part}.bin")) for part in ("train", "test"))
    return Cifar100Copy(train, test, given)


def _checked_labels(path: Path, labels: NDArray[Any]) -> list[int]:
    """Returns labels as plain numbers, and refuses a file with none or with others than 0 to 99."""
    if not len(labels) or not 0 <= int(labels.min()) <= int(labels.max()) < CLASSES:
        raise InputError(f"{path} has no labels from 0 to {CLASSES - 1}; get the file again")
    return [int(label) for label in labels]


class BinaryImages(LabeledImages):
    """A split of the binary version: of each image a byte of coarse label, one of fine label, and
    the pixels of 32 x 32 channel by channel.

    Raises:
        InputError: if the file is missing, no whole number of images, or a label is out of range.
    """

    def __init__(self, path: Path) -> None:
        try:
            size = path.stat().st_size
            if size == 0 or size % RECORD:
                raise InputError(
                    f"{path} has {size} bytes, and an image has {RECORD}; get it again"
                )
            self.records = np.memmap(path, np.uint8, "r").reshape(-1, RECORD)
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read {path}: {first_line(error)}") from error
        self.labels = _checked_labels(path, self.records[:, 1])

    def __len__(self) -> int:
        return len(self.records)

    def item(self, index: int) -> Labeled:
        planes = np.array(self.records[index, 2:]).reshape(3, SIDE, SIDE)
        return open_image(planes.transpose(1, 2, 0)), self.labels[index]


class PackedImages(LabeledImages):
    """A split in Parquet files as `datasets` writes them: pictures as encoded bytes, and labels.

    Raises:
        InputError: if a file cannot be read, or lacks a column of pictures or of fine labels.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        schema = self._schema()
        self.picture, self.label = (
            next((name for name in known if name in schema.names), None)
            for known in (PICTURES, LABELS)
        )
        if self.picture is None or self.label is None:
            raise InputError(
                f"{self.paths[0]} has the columns {', '.join(schema.names)}; it needs "
                f"{' or '.join(PICTURES)}, and {' or '.join(LABELS)}"
            )
        self.names = self._names(schema)
        self.labels = _checked_labels(self.paths[0], self._column(self.label).to_numpy())

    def _schema(self) -> Any:
        try:
            return extra("pyarrow.parquet").read_schema(self.paths[0])
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read {self.paths[0]}: {first_line(error)}") from error

    def _names(self, schema: Any) -> tuple[str, ...] | None:
        """Returns the class names that `datasets` keeps beside the columns."""
        try:
            features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
            return tuple(map(str, features[self.label]["names"]))
        except (KeyError, TypeError, ValueError):
            return None

    def _column(self, name: str) -> Any:
        arrow, parquet = extra("pyarrow"), extra("pyarrow.parquet")
        try:
            tables = [parquet.read_table(path, columns=[name]) for path in self.paths]
            return arrow.concat_tables(tables)[name]
        except (OSError, ValueError, LookupError) as error:
            raise InputError(f"cannot read {self.paths[0]}: {first_line(error)}") from error

    @cached_property
    def encoded(self) -> Any:
        """Returns the pictures as they are stored, some 120 MB of CIFAR-100's training images."""
        return self._column(str(self.picture))

    def __len__(self) -> int:
        return len(self.labels)

    def item(self, index: int) -> Labeled:
        stored = self.encoded[index].as_py()
        content = stored.get("bytes") if isinstance(stored, dict) else stored
        if not isinstance(content, bytes):
            raise InputError(f"row {index} of {self.paths[0]} holds no picture; get it again")
        try:
            return open_image(BytesIO(content)), self.labels[index]
        except InputError as error:
            raise InputError(f"row {index} of {self.paths[0]} cannot be read: {error}") from error
