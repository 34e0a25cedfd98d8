"""SCOPE against a greedy loop over its definition."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from vlm_prune.pruning.received import in_tower
from vlm_prune.pruning.scope import Scope
from vlm_prune.vlm.common.errors import InputError


@pytest.mark.parametrize("alpha", [1.0, 0.0, 2.0])
def test_selection_equals_the_papers_loop(alpha, vision):
    kept = Scope(budget=7, alpha=alpha).reduce(vision)
    for image, features in enumerate(vision.features.double()):
        saliency = in_tower(vision, "cls")[image].double() ** alpha
        similarity = torch.stack([cosine_similarity(own, features) for own in features])
        picked, covered = [], torch.zeros(len(features))
        while len(picked) < 7:
            gains = [
                -1.0
                if j in picked
                else float(saliency[j] * (similarity[:, j] - covered).clamp(min=0).sum())
                for j in range(len(features))
            ]
            picked.append(max(range(len(gains)), key=gains.__getitem__))
            covered = torch.maximum(covered, similarity[:, picked[-1]])
        assert kept.indices[image].tolist() == sorted(picked)


def test_a_negative_power_is_refused():
    with pytest.raises(InputError, match="alpha -1.0 is negative"):
        Scope(alpha=-1.0)
