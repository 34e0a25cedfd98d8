"""Streams of classification tasks: published, embedded, or made of a user's own folders."""

from collections.abc import Callable
from pathlib import Path

from vlm_prune.continual.streams.base import StreamTask
from vlm_prune.continual.streams.benchmarks import mtil, x_tail
from vlm_prune.continual.streams.coop import read_coop_split
from vlm_prune.continual.streams.files import csv_manifest, image_folder
from vlm_prune.continual.streams.increments import cifar100_increments, class_increments
from vlm_prune.continual.streams.packaged import packaged
from vlm_prune.continual.streams.redrawn import redrawn
from vlm_prune.continual.streams.stream import Stream, few_shot, write_indices
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.paths import DataRoot
from vlm_prune.vlm.common.registry import Registry
from vlm_prune.vlm.common.renamed import renamed_names

__getattr__ = renamed_names(__name__, {"Task": "StreamTask"})
# those that need no data, for the embedded CLIP
EMBEDDED = {"packaged": packaged, "redrawn": redrawn}
Make = Callable[[DataRoot, int, int | None, bool], Stream]
STREAMS: Registry[Make] = Registry(
    "stream",
    {
        "packaged": lambda root, seed, shots, skip: _embedded("packaged", shots, seed),
        "redrawn": lambda root, seed, shots, skip: _embedded("redrawn", shots, seed),
        "mtil-1": lambda root, seed, shots, skip: mtil(root, 1, shots, seed, skip),
        "mtil-2": lambda root, seed, shots, skip: mtil(root, 2, shots, seed, skip),
        "mtil-5shot": lambda root, seed, shots, skip: mtil(root, 1, _or(shots, 5), seed, skip),
        "x-tail": lambda root, seed, shots, skip: x_tail(root, _or(shots, 16), seed, False, skip),
        "cifar100-10": lambda root, seed, shots, skip: cifar100_increments(root, shots, seed, skip),
    },
)


def open_stream(
    name: str, root: Path | DataRoot = Path("."), seed: int = 0, shots: int | None = None,
    skip_bad: bool = False,
) -> Stream:  # fmt: skip
    """Opens a stream by name.

    Args:
        name: in `STREAMS`.
        root: folder of the data sets, which their files must not leave unless it is a `DataRoot`
            that allows it; embedded streams need none.
        seed: of the shots of few-shot streams.
        shots: training images per class; None is what the stream is published with.
        skip_bad: leave out images that cannot be read, each named in a warning.

    Raises:
        InputError: if the name is unknown, data are missing under `root`, `shots` is not positive,
            or a class has fewer images.
    """
    make, data = STREAMS[name], DataRoot.of(root)
    if name not in EMBEDDED and not data.folder.is_dir():
        raise InputError(
            f"data root {data.folder} is not a folder; give the folder of the data sets"
        )
    return make(data, seed, shots, skip_bad)


def _embedded(name: str, shots: int | None, seed: int) -> Stream:
    tasks = EMBEDDED[name]()
    if shots is not None:
        tasks = tuple(few_shot(task, shots, seed) for task in tasks)
    return Stream(name, tasks, joint=True, ensemble=False)


def _or(shots: int | None, published: int) -> int:
    return published if shots is None else shots


__all__ = [
    "EMBEDDED",
    "STREAMS",
    "Stream",
    "StreamTask",
    "cifar100_increments",
    "class_increments",
    "csv_manifest",
    "few_shot",
    "image_folder",
    "mtil",
    "open_stream",
    "packaged",
    "read_coop_split",
    "redrawn",
    "write_indices",
    "x_tail",
]
