"""The images and videos that a task of lmms-eval shows, for pictures of runs that are done."""

from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import datasets
from PIL import Image

from vlm_prune.benchmarks.evaluation.records import RunConfig
from vlm_prune.benchmarks.lmms_eval.chat import conversation
from vlm_prune.benchmarks.lmms_eval.load import load_task
from vlm_prune.benchmarks.lmms_eval.run import in_one_line, leaves_of
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.paths import DataRoot
from vlm_prune.vlm.common.video import FRAMES, VideoClip, open_video


def images_of(
    name: str,
    questions: dict[int, str],
    data_root: DataRoot | Path | None,
    config: RunConfig,
) -> dict[int, list[Image.Image | VideoClip]]:
    """Loads the images and frames of videos of questions by their numbers.

    Args:
        name: of the task.
        questions: question texts by number.
        data_root: folder of data sets; None for the hub's.
        config: of the run that asked; its limit decides which rows of some tasks have which numbers.

    Raises:
        InputError: if the data are not there, or are not those that were asked about.
    """
    datasets.disable_progress_bars()
    limits = (leaf.limit for leaf in leaves_of(config, {}) if leaf.name == name)
    limit = next(limits, max(questions) + 1)
    try:
        with redirect_stderr(StringIO()):
            task = load_task(name, data_root, limit=limit)
            chats = {
                number: conversation(task.doc_to_messages(task.eval_docs[number]))
                for number in questions
            }
    except Exception as error:
        raise InputError(in_one_line(error)) from error
    if any(chats[number].question != question for number, question in questions.items()):
        raise InputError("its data are not those that were asked about")
    frames = config.frames or FRAMES
    return {
        number: [*chat.images(), *(open_video(name, frames) for name in chat.videos())]
        for number, chat in chats.items()
    }
