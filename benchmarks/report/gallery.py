"""Questions with their pictures, answers and kept tokens, as the page's script reads them."""

import base64
import io
import math
from itertools import chain, count, repeat
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from vlm_prune.benchmarks.evaluation.records import PairedRow
from vlm_prune.benchmarks.report.load import Run
from vlm_prune.benchmarks.report.numbers import BudgetFigures
from vlm_prune.benchmarks.report.overlay import SMALL, spaced
from vlm_prune.benchmarks.report.plot import series_of
from vlm_prune.benchmarks.report.shown import ShownImages, pictures_of
from vlm_prune.benchmarks.tasks import TASKS
from vlm_prune.vlm.common.paths import DataRoot
from vlm_prune.vlm.common.video import VideoClip

LARGEST = 448  # pixels


def chosen(runs: list[Run], most: int) -> list[str]:
    """Returns ids of at most `most` questions about images, the tasks taking turns.

    Those whose answer some run broke or mended come first.
    """
    changed = {row.id for run in runs for row in run.rows if row.broken or row.fixed}
    turns: dict[str, count[int]] = {}
    ranked = []
    for row in runs[0].rows:
        if TASKS[row.task].visual if row.task in TASKS else row.images:
            turn = next(turns.setdefault(row.task, count()))
            ranked.append((row.id not in changed, turn, row.id))
    return [name for _, _, name in sorted(ranked, key=lambda entry: entry[:2])[:most]]


def gallery(
    runs: list[Run], groups: list[BudgetFigures], most: int, data_root: DataRoot | Path | None
) -> dict[str, Any]:
    """Returns what the script needs: pictures once each, and for each question an answer per run.

    Args:
        runs: what the page shows.
        groups: the runs by budget.
        most: questions with pictures.
        data_root: folder of local data sets.

    Raises:
        InputError: as `pictures_of` does.
    """
    rows = [{row.id: row for row in run.rows} for run in runs]
    names = series_of(runs)
    images: dict[str, int] = {}
    samples = list[dict[str, Any]]()
    first_rows = [rows[0][name] for name in chosen(runs, most)]
    shown, missing = pictures_of(runs[0], first_rows, data_root)
    for first in first_rows:
        if not shown.get(first.id):
            continue
        name, views = first.id, _views(shown[first.id], first)
        grids = [*(grid for _, grid in views), *first.grids[len(shown[name]) :]]
        pictures = [images.setdefault(_data_uri(picture), len(images)) for picture, _ in views]
        samples.append(
            {
                "id": name,
                "task": first.task,
                "question": first.question,
                "gold": first.answer,
                "baseline": first.baseline,
                "right": first.baseline_right,
                "images": pictures,
                "grids": grids,
                "answers": [_answer(row[name]) if name in row else None for row in rows],
            }
        )
    return {
        "missing": missing,
        "whole": any(None in sample["grids"] for sample in samples),
        "budgets": [group.label for group in groups],
        "methods": names,
        "runs": [
            {
                "method": names.index(run.label),
                "budget": next(n for n, g in enumerate(groups) if g.tokens == run.tokens),
            }
            for run in runs
        ],
        "images": list(images),
        "samples": samples,
    }


def _views(media: ShownImages, row: PairedRow) -> list[tuple[Image.Image, tuple[int, int] | None]]:
    """Returns what is drawn of the images and videos of a question, frame by frame, each with rows
    and columns of its tokens.

    Where a model encodes several frames as one, the first one of them is drawn.

    Args:
        media: of the question.
        row: of an answer to it.
    """
    views: list[tuple[Image.Image, tuple[int, int] | None]] = []
    each = zip(chain(row.grids, repeat(None)), chain(row.video_grids, repeat(None)), strict=False)
    for medium, (grid, video) in zip(media, each, strict=False):
        if not isinstance(medium, VideoClip):
            views.append((whole_picture(medium, row.cropped, grid), grid))
        elif video is not None:
            frames, *sides = video
            for number in spaced(len(medium.frames), frames):
                picture = Image.fromarray(medium.frames[number])
                views.append((ImageOps.contain(picture, (SMALL, SMALL)), (sides[0], sides[1])))
    return views


def _answer(row: PairedRow) -> dict[str, Any]:
    kept: list[str | None] = []
    for number, indices in enumerate(row.kept):
        grid, video = row.grids[number], row.video_grids[number] if row.video_grids else None
        if video is None:
            kept.append(grid and _bits(indices, math.prod(grid)))
            continue
        frames, size = video[0], video[1] * video[2]
        # tokens behind the frames, such as newlines, are none of a frame
        own = [[index % size for index in indices if index // size == n] for n in range(frames)]
        kept += [_bits(chosen, size) for chosen in own]
    return {
        "text": row.prediction,
        "right": row.right,
        "broken": row.broken,
        "mended": row.fixed,
        "kept": kept,
    }


def _bits(indices: list[int], tokens: int) -> str:
    """Returns one bit per token, in reading order, base64."""
    mask = np.zeros(tokens, bool)
    mask[indices] = True
    return base64.b64encode(np.packbits(mask).tobytes()).decode()


def whole_picture(picture: Image.Image, cropped: bool, grid: tuple[int, int] | None) -> Image.Image:
    """Returns what the grid covers of a picture, no larger than needed.

    Args:
        picture: as it was given.
        cropped: whether the model sees only its middle.
        grid: rows and columns of its tokens; None where they are no single grid.
    """
    if cropped and grid is not None:
        picture = ImageOps.fit(picture, (min(picture.size),) * 2)
    return ImageOps.contain(picture, (LARGEST, LARGEST)) if max(picture.size) > LARGEST else picture


def _data_uri(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
