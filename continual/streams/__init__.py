"""Streams of classification tasks: published, packaged, or made of a user's own folders."""

from collections.abc import Callable
from pathlib import Path

from vlm_prune.continual.streams.base import Task
from vlm_prune.continual.streams.benchmarks import mtil, x_tail
from vlm_prune.continual.streams.coop import read_coop_split
from vlm_prune.continual.streams.files import csv_manifest, image_folder
from vlm_prune.continual.streams.packaged import packaged
from vlm_prune.continual.streams.stream import Stream, few_shot, write_indices
from vlm_prune.vlm.errors import InputError
from vlm_prune.vlm.registry import Registry

STREAMS: Registry[Callable[[Path, int], Stream]] = Registry(
    "stream",
    {
        "packaged": lambda root, seed: Stream("packaged", packaged(), joint=True, ensemble=False),
        "mtil-1": lambda root, seed: mtil(root, 1),
        "mtil-2": lambda root, seed: mtil(root, 2),
        "mtil-5shot": lambda root, seed: mtil(root, 1, shots=5, seed=seed),
        "x-tail": lambda root, seed: x_tail(root, seed=seed),
    },
)


def open_stream(name: str, root: Path = Path("."), seed: int = 0) -> Stream:
    """A stream by name.

    Args:
        name: in `STREAMS`.
        root: folder of the data sets; the packaged stream needs none.
        seed: of the shots of few-shot streams.

    Raises:
        InputError: if the name is unknown or data are missing under `root`.
    """
    make = STREAMS[name]
    if name != "packaged" and not root.is_dir():
        raise InputError(f"data root {root} is not a folder; give the folder of the data sets")
    return make(root, seed)


__all__ = [
    "STREAMS",
    "Stream",
    "Task",
    "csv_manifest",
    "few_shot",
    "image_folder",
    "mtil",
    "open_stream",
    "packaged",
    "read_coop_split",
    "write_indices",
    "x_tail",
]
