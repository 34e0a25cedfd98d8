"""What a finished run says: accuracies, hits, and what each task cost and changed."""

from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.records import read_record
from vlm_prune.vlm.common.renamed import renamed_names
from vlm_prune.vlm.common.state import load_tensors

ADVICE = "remove the folder and train again"
__getattr__ = renamed_names(__name__, {"Results": "StreamResults"})


class StoredResults(msgspec.Struct, kw_only=True):
    """What `results.json` holds; lists grow by an entry with each task, fields as in `StreamResults`."""

    method: str
    tasks: list[str]
    zero_shot: list[float] | None = None
    matrix: list[list[float]] = []
    trainable: list[int] = []
    added: list[int] = []
    added_bytes: list[int] = []
    norms: list[float | None] = []
    drift: list[float] = []


@dataclass(frozen=True)
class StreamResults:
    """Top-1 accuracy in [0, 1], and which test images were right.

    Args:
        tasks: names of the N tasks.
        zero_shot: (N,) before any task.
        matrix: (N, N) after task t (row) on task i (column).
        zero_shot_hits: for each task's test set (n,) of 0 and 1.
        hits: for each task's test set (N, n), row t after task t.
        trainable: parameters trained in each task.
        added: parameters that answering needs beside the model's own, after each task.
        norms: Frobenius norm of each task's change; None for methods without factors.
        drift: Frobenius distance of the weights from the initial ones, after each task.
        added_bytes: that answering needs beside the model's own, after each task; none of older runs.
    """

    tasks: list[str]
    zero_shot: NDArray[np.float64]
    matrix: NDArray[np.float64]
    zero_shot_hits: list[NDArray[np.uint8]]
    hits: list[NDArray[np.uint8]]
    trainable: list[int]
    added: list[int]
    norms: list[float | None]
    drift: list[float]
    added_bytes: list[int] = field(default_factory=list)


def read_results(output: Path) -> StreamResults:
    """Returns what a finished run wrote into its folder.

    Raises:
        InputError: if a file is missing or damaged, or the run is not finished.
    """
    path = output / "results.json"
    record = read_record(path, StoredResults, ADVICE)
    names, count = record.tasks, len(record.tasks)
    rows = [record.zero_shot or [], *record.matrix]
    lists = (record.trainable, record.added, record.norms, record.drift)
    if not count or [len(row) for row in rows] != [count] * (count + 1):
        raise InputError(f"{path} is of a run that has not finished; train on, or {ADVICE}")
    if any(len(values) != count for values in lists):
        raise InputError(f"{path} does not say the same of each task; {ADVICE}")
    files = ["zero-shot", *(f"task-{number}" for number in range(count))]
    before, *after = [_hits(output / "correct" / f"{name}.safetensors", names) for name in files]
    hits = [np.stack([row[name] for row in after]) for name in names]
    zero_shot, matrix = np.array(rows[0]), np.array(rows[1:], dtype=np.float64)
    correct = [before[name] for name in names]
    return StreamResults(names, zero_shot, matrix, correct, hits, *lists, record.added_bytes)


def _hits(path: Path, names: list[str]) -> dict[str, NDArray[np.uint8]]:
    """Returns which test images of each task were right, (n,) of 0 and 1."""
    tensors = load_tensors(path)
    if tensors.keys() != set(names) or any(tensor.ndim != 1 for tensor in tensors.values()):
        raise InputError(f"{path} is not of these tasks; {ADVICE}")
    return {name: tensor.numpy() for name, tensor in tensors.items()}
