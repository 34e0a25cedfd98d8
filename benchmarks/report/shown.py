"""The images and videos of questions that were answered: made again, or read from their data set again."""

from pathlib import Path

from PIL import Image

from vlm_prune.benchmarks import lmms_eval
from vlm_prune.benchmarks.evaluation.engine import drawn_sample
from vlm_prune.benchmarks.evaluation.records import PairedRow, RunConfig
from vlm_prune.benchmarks.report.load import Run
from vlm_prune.benchmarks.tasks import TASKS
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.paths import DataRoot
from vlm_prune.vlm.common.video import VideoClip

ShownImages = list[Image.Image | VideoClip]


def pictures_of(
    run: Run, rows: list[PairedRow], data_root: DataRoot | Path | None
) -> tuple[dict[str, ShownImages], dict[str, str]]:
    """Returns images and videos by the question's id, and by task why there are none.

    Args:
        run: whose questions are shown.
        rows: of the questions.
        data_root: folder of local data sets.

    Raises:
        InputError: if this version's embedded tasks no longer make the questions of the run.
    """
    found = {row.id: _task_images(run, row) for row in rows if row.task in TASKS}
    missing = {}
    for task in sorted({row.task for row in rows} - set(TASKS)):
        questions = {row.number: row.question for row in rows if row.task == task}
        try:
            pictures = _read(task, questions, data_root, run.results.config)
        except InputError as error:
            missing[task] = str(error)
        else:
            found |= {f"{task}/{number:06d}": images for number, images in pictures.items()}
    return found, missing


def _read(
    task: str, questions: dict[int, str], data_root: DataRoot | Path | None, config: RunConfig
) -> dict[int, ShownImages]:
    if not lmms_eval.installed():
        raise InputError(f"its images are read by lmms-eval: {lmms_eval.INSTALL}")
    from vlm_prune.benchmarks.lmms_eval.shown import images_of

    return images_of(task, questions, data_root, config)


def _task_images(run: Run, row: PairedRow) -> ShownImages:
    config = run.results.config
    sample = drawn_sample(row.task, row.number, config.seed, config.split, config.frames)
    if (sample.turns[-1].text, sample.answer) == (row.question, row.answer):
        return [*sample.images, *sample.videos]
    raise InputError(
        f"{run.path}: question {row.id} is not the one that this version makes; "
        "run it again, or give --gallery 0"
    )
