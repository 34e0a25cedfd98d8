"""Where the video files of lmms-eval's tasks lie in a local copy of their data set."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.paths import DataRoot

SUFFIXES = ("", ".mp4", ".MP4", ".mkv")
FileNames = Callable[[dict[str, Any], Any], list[str]]


def _mvbench(row: dict[str, Any], task: Any) -> list[str]:
    """Returns names inside the folder of the row's source, which the task's own table names."""
    source = task.config.doc_to_visual.__globals__["DATA_LIST"]
    name = f"{source[task.lmms_eval_specific_kwargs['sub_task']]}/{row['video']}"
    # as its archives are unpacked beside them or above
    return [name, f"video/{name}", f"data0613/{name}", f"video/data0613/{name}"]


FILES: dict[str, FileNames] = {
    "lmms-eval/Video-MME": lambda row, task: [f"data/{row['videoID']}"],
    "OpenGVLab/MVBench": _mvbench,
    "lmms-eval/egoschema": lambda row, task: [f"videos/{row['video_idx']}"],
    "longvideobench/LongVideoBench": lambda row, task: [f"videos/{row['video_path']}"],
    "sy1998/MLVU_dev": lambda row, task: [row["video_name"], f"video/{row['video_name']}"],
}
"""By data set the names that a row's video may have, seen from its folder, perhaps without the ending."""


def video_of(row: dict[str, Any], task: Any, root: DataRoot) -> Path:
    """Returns the video file of a row.

    Args:
        row: of the data set.
        task: of lmms-eval.
        root: folder of the data set.

    Raises:
        InputError: if the file is not there, or its name leads out of the folder.
    """
    names = FILES[task.DATASET_PATH](row, task)
    paths = [root.path(f"{name}{suffix}") for name in names for suffix in SUFFIXES]
    found = next((path for path in paths if path.is_file()), None)
    if found is None:
        raise InputError(f"the video {root.folder / names[0]} is not there; download it again")
    return found


def missing_videos(
    rows: Iterable[dict[str, Any]], task: Any, root: DataRoot, limit: int | None
) -> dict[int, str]:
    """Returns by their numbers why videos of rows cannot be used.

    Args:
        rows: of the data set.
        task: of lmms-eval.
        root: folder of the data set.
        limit: how many rows are going to be asked; later ones are not looked at. None for all.

    Raises:
        InputError: if no row is left.
    """
    missing, found = dict[int, str](), 0
    for number, row in enumerate(rows):
        if found == limit:
            break
        try:
            video_of(row, task, root)
            found += 1
        except InputError as error:
            missing[number] = str(error)
    if missing and not found:
        raise InputError(
            f"none of the videos of its {len(missing)} rows can be read; the first: {missing[0]}"
        )
    return missing
