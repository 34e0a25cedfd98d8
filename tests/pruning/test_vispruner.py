"""VisPruner against a slow loop written from the paper."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from vlm_prune.pruning.received import in_tower
from vlm_prune.pruning.vispruner import VisPruner, without_duplicates
from vlm_prune.vlm.errors import InputError


@pytest.mark.parametrize(("count", "k", "step"), [(40, 9, 8), (41, 30, 4), (23, 0, 8), (5, 5, 8)])
def test_duplicate_removal_equals_the_papers_loop(count, k, step):
    torch.manual_seed(count)
    features = torch.randn(2, count, 6)
    kept = without_duplicates(features, k, step)
    for image in range(2):
        left = list(range(count))
        while len(left) > k:
            even, odd = left[::2], left[1::2]
            closest = {
                i: max(
                    (
                        float(cosine_similarity(features[image, i], features[image, j], 0))
                        for j in odd
                    ),
                    default=0.0,
                )
                for i in even
            }
            worst = sorted(even, key=lambda i: -closest[i])[: min(step, len(left) - k)]
            left = [i for i in left if i not in worst]
        assert kept[image].tolist() == left


def test_half_the_budget_goes_to_attention(vision):
    kept = VisPruner(budget=64).reduce(vision)
    attended = in_tower(vision, "cls").topk(32).indices
    for image in range(2):
        places = set(kept.places[image].tolist())
        assert len(places) == 64
        assert set(attended[image].tolist()) <= places


def test_all_by_attention_is_the_cls_ranking(vision):
    kept = VisPruner(budget=64, important=1).reduce(vision)
    expected = in_tower(vision, "cls").topk(64).indices.sort().values
    assert torch.equal(torch.stack(kept.places), expected)


def test_a_step_of_zero_is_refused():
    with pytest.raises(InputError, match="step"):
        VisPruner(step=0)
