"""lmms-eval's tasks with one unpruned model, for comparisons between models."""

from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import datasets

from vlm_prune.benchmarks.evaluation.records import AnswerRow
from vlm_prune.benchmarks.evaluation.store import RunFolder
from vlm_prune.benchmarks.lmms_eval.model import PrunedChat
from vlm_prune.benchmarks.lmms_eval.run import in_one_line, leaves_of, one_pass, task_of, unpruned
from vlm_prune.benchmarks.lmms_eval.score import reply_of, score_of
from vlm_prune.vlm.common.paths import DataRoot


def answer_alone(
    model: PrunedChat, folder: RunFolder[AnswerRow], data_root: DataRoot | Path | None = None
) -> dict[str, str]:
    """Fills the folder with a row for each question; returns why tasks were skipped.

    Answers are taken from the cache of unpruned answers, and put there.

    Args:
        model: answers, unpruned.
        folder: of the run.
        data_root: folder of data sets; None for the hub's.
    """
    datasets.disable_progress_bars()
    config, skipped = folder.config, dict[str, str]()
    for leaf in leaves_of(config, skipped):
        try:
            with redirect_stderr(StringIO()):
                task = task_of(leaf, folder, data_root, skipped, model.check_image)
                found = one_pass(leaf, task, model, None, unpruned(leaf, model, config))
            assert found is not None  # only in other processes, which the suite does not have
            rows = [
                AnswerRow(
                    id=f"{leaf.shown}/{number:06d}",
                    task=leaf.shown,
                    subset=str(sample["doc"].get("category") or ""),
                    question=found.answers[number][0].question,
                    answer=str(sample["target"]),
                    prediction=reply_of(task, sample),
                    score=score_of(task, sample),
                    images=found.answers[number][0].images,
                )
                for number, sample in sorted(found.samples.items())
            ]
            folder.append(rows)
        except Exception as error:  # noqa: BLE001  a task may raise anything; the others go on
            skipped[leaf.shown] = in_one_line(error)
    return skipped
