"""Which images there are, and opening one: whatever is wrong with it becomes a row's error."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import csv, parquet

from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.paths import DataRoot
from vlm_prune.vlm.common.video import SUFFIXES as VIDEOS
from vlm_prune.vlm.common.video import VideoClip, open_visual

SUFFIXES = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
MANIFESTS = (".csv", ".parquet")


def input_root(source: Path, allow_outside: bool = False) -> DataRoot:
    """Returns the folder that paths start from, and must not leave unless the user allows it."""
    folder = (source if source.is_dir() else source.parent).resolve()
    return DataRoot(folder, allow_outside)


def find_images(
    source: Path, prompt: str, limit: int | None = None, videos: bool = False
) -> pa.Table:
    """Returns the rows to answer: `row` (their number), `path` below
    `input_root(source)`, `prompt`.

    Args:
        source: a folder, searched with its subfolders in the order of the paths, or a Parquet or
            CSV file with a column `path` and perhaps one `prompt`, in the order of its rows.
        prompt: asked where a row has none of its own.
        limit: only so many of the first.
        videos: whether video files of a folder are rows, too; a manifest names what it likes.

    Raises:
        InputError: if there is no such source, no image in it, or a row without a prompt.
    """
    if not source.exists():
        raise InputError(f"no such input: {source}; give a folder of images or a manifest")
    if source.is_dir():
        suffixes = SUFFIXES + VIDEOS * videos
        paths = _walk(source.resolve(), suffixes)[:limit]
        prompts: list[str | None] = [None] * len(paths)
    elif source.suffix.lower() in MANIFESTS:
        paths, prompts = _manifest(source, limit)
    else:
        raise InputError(
            f"{source} is neither a folder nor a manifest; give a folder or {' or '.join(MANIFESTS)} file"
        )
    if not paths:
        raise InputError(
            f"there are no images in {source}; give a folder with files of "
            f"{', '.join(SUFFIXES + VIDEOS * videos)}"
        )
    row_prompts = [text or prompt for text in prompts]
    if not all(row_prompts):
        raise InputError(
            f"row {row_prompts.index('') + 1} of {source} has no prompt; give --prompt"
        )
    names = [path.encode("utf-8", "backslashreplace").decode() for path in paths]
    return pa.table(
        {"row": pa.array(range(len(names)), pa.int64()), "path": names, "prompt": row_prompts}
    )


def _walk(root: Path, suffixes: tuple[str, ...]) -> list[str]:
    """Returns files with these suffixes below `root`, and the links to folders
    outside, which become errors.
    """

    def refuse(error: OSError) -> None:
        raise error

    found = []
    for folder, folders, files in os.walk(root, onerror=refuse):
        directory = Path(folder)
        names = [name for name in files if name.lower().endswith(suffixes)]
        names += [name for name in folders if not _inside(root, directory / name)]
        found += [(directory / name).relative_to(root).as_posix() for name in names]
    return sorted(found)


def _inside(root: Path, path: Path) -> bool:
    return path.resolve().is_relative_to(root)


def _manifest(source: Path, limit: int | None) -> tuple[list[str], list[str | None]]:
    names = ("path", "prompt")
    try:
        if source.suffix.lower() == ".csv":
            texts = csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()))
            table = csv.read_csv(source, convert_options=texts)
        else:
            available = parquet.read_schema(source).names
            table = parquet.read_table(
                source, columns=[name for name in names if name in available]
            )
        if "path" not in table.column_names:
            raise InputError(f"{source} has no column 'path'")
        table = table.slice(0, limit)
        paths = table["path"].cast(pa.string()).to_pylist()
        prompts: list[str | None] = [None] * len(paths)
        if "prompt" in table.column_names:
            prompts = table["prompt"].cast(pa.string()).to_pylist()
    except (pa.ArrowException, KeyError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {source}: {printable(error)}") from error
    return [path or "" for path in paths], prompts


def open_below(
    root: DataRoot, path: str, frames: int = 32, fps: float | None = None
) -> Image.Image | VideoClip:
    """Opens the image at `path` below `root`, as RGB, or frames of the video there.

    Args:
        root: of the input.
        path: below it.
        frames: of a video, at most.
        fps: frames for each second instead.

    Raises:
        InputError: if it is no file, leads out of the root, or is no sound image or video.
    """
    file = root.path(path)
    if not file.is_file():
        raise InputError(f"{path} is no file")
    return open_visual(file, frames, fps)


PIXELS = pa.schema(
    [
        ("row", pa.int64()),
        ("prompt", pa.string()),
        ("error", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("pixels", pa.large_binary()),  # 64-bit offsets: a batch may be above 2 GiB
        ("times", pa.list_(pa.float64())),  # of a video's frames; null for images
        ("duration", pa.float64()),
    ]
)


def decode(
    rows: pa.Table, root: DataRoot, frames: int = 32, fps: float | None = None
) -> Iterator[pa.Table]:
    """Yields rows of `find_images` with their pixels, one at a time so
    that Ray Data can cut blocks.

    Args:
        rows: of `find_images`.
        root: of the input.
        frames: of a video, at most.
        fps: frames for each second instead.
    """
    for row in rows.to_pylist():
        error, size, pixels, times, duration = None, (0, 0), b"", None, None
        try:
            shown = open_below(root, row["path"], frames, fps)
            if isinstance(shown, VideoClip):
                height, width = shown.frames.shape[1:3]
                size, pixels = (width, height), shown.frames.tobytes()
                times, duration = list(shown.times), shown.duration
            else:
                size, pixels = shown.size, shown.tobytes()
        except Exception as problem:  # noqa: BLE001 - decoders fail in many ways; none may end the run
            error = printable(problem)
        values = (row["row"], row["prompt"], error, *size, pixels, times, duration)
        yield pa.table([[value] for value in values], schema=PIXELS)


def printable(error: Exception) -> str:
    """Returns our own messages as they are, others with their type."""
    text = " ".join(str(error).split())
    return text if isinstance(error, InputError) else f"{type(error).__name__}: {text}"


def shown_of(row: dict[str, Any]) -> Image.Image | VideoClip:
    """Returns the image or video of a row of `decode`."""
    width, height = row["width"], row["height"]
    if row["times"] is None:
        return Image.frombuffer("RGB", (width, height), row["pixels"])
    flat = np.frombuffer(bytearray(row["pixels"]), np.uint8)  # writable, as torch wants it
    frames = flat.reshape(-1, height, width, 3)
    return VideoClip(frames, tuple(row["times"]), row["duration"])
