"""What a finished run says: accuracies, hits, and what each task cost and changed."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file


@dataclass(frozen=True)
class Results:
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


def read_results(output: Path) -> Results:
    """What a finished run wrote into its folder."""
    record = json.loads((output / "results.json").read_text())
    names, matrix = record["tasks"], np.array(record["matrix"], dtype=np.float64)
    rows = ["zero-shot", *(f"task-{number}" for number in range(len(names)))]
    before, *after = [load_file(output / "correct" / f"{row}.safetensors") for row in rows]
    hits = [np.stack([row[name] for row in after]) for name in names]
    zero_shot, first = np.array(record["zero_shot"]), [before[name] for name in names]
    counts = (record[key] for key in ("trainable", "added", "norms", "drift"))
    return Results(names, zero_shot, matrix, first, hits, *counts)
