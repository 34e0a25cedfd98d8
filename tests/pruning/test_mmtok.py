"""MMTok against greedy maximum coverage written as loops."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cosine_similarity

from vlm_prune.pruning.mmtok import MMTok
from vlm_prune.vlm.common.errors import InputError


def slow(vision, image, question, pruner, k):
    """One image, float64: the rows of the authors' matrix, and what each set adds to their maxima."""
    projected, features = vision.projected[image].double(), vision.features[image].double()
    rows = []
    for text in question.double():
        cosines = cosine_similarity(text, projected)
        rows.append((cosines / pruner.text_temperature).softmax(0) / len(question))
    for own in features:
        cosines = cosine_similarity(own, features)
        share = pruner.image_weight / len(features)
        rows.append((cosines / pruner.image_temperature).softmax(0) * share)
    matrix, covered, picked = torch.stack(rows), torch.zeros(len(rows)), []
    while len(picked) < k:
        gains = [
            -1.0 if j in picked else float((matrix[:, j] - covered).clamp(min=0).sum())
            for j in range(len(features))
        ]
        picked.append(max(range(len(gains)), key=gains.__getitem__))
        covered = torch.maximum(covered, matrix[:, picked[-1]])
    return sorted(picked)


def test_selection_equals_the_papers_loop(vision):
    torch.manual_seed(0)
    width = vision.projected.shape[-1]
    questions = torch.randn(5, width), torch.randn(9, width)
    pruner = MMTok(budget=8, text_temperature=0.1)
    kept = pruner.reduce(replace(vision, question=lambda: questions))
    for image, question in enumerate(questions):
        assert kept.indices[image].tolist() == slow(vision, image, question, pruner, 8)
    alone = pruner.reduce(vision)
    assert alone.indices[0].tolist() == slow(vision, 0, questions[0][:0], pruner, 8)
    assert kept.indices[0].tolist() != alone.indices[0].tolist()


@pytest.mark.parametrize(
    "wrong", [{"text_temperature": 0.0}, {"image_temperature": -1.0}, {"image_weight": -0.5}]
)
def test_bad_hyperparameters_are_refused(wrong):
    with pytest.raises(InputError, match="above 0"):
        MMTok(**wrong)
