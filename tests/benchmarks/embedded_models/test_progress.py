"""TrainingProgress of a training: which answers are right, running shares, and what a resumed one reads."""

import pytest
import torch

from vlm_prune.benchmarks.embedded_models.progress import TrainingProgress, answers_right

END = 9


def test_an_answer_is_right_if_each_of_its_tokens_is():
    kinds = ["ocr"] * 3 + ["count"] * 2 + ["ocr"] * 2
    labels = torch.tensor([4, 5, END, 6, END, 7, END])
    hits = torch.tensor([True, False, True, True, False, True, True])
    assert answers_right(kinds, labels, hits, END) == {"ocr": [False, True], "count": [True]}


def test_shares_start_at_three_tenths_and_move_at_most_so_far():
    progress = TrainingProgress()
    progress.count({"ocr": [True, True]}, pace=0.1, most=0.5)
    assert progress.running == {"ocr": pytest.approx(0.3 + 0.7 * 0.2)}
    progress.running["ocr"] = 1.0
    progress.count({"ocr": [False] * 9}, pace=0.1, most=0.5)
    assert progress.running == {"ocr": pytest.approx(0.5)}


def test_progress_is_read_as_it_was_saved():
    progress = TrainingProgress(7, 1234.56789, {"ocr": 0.25})
    assert TrainingProgress.read(progress.tensors() | {"lora.a": torch.zeros(2)}) == progress
