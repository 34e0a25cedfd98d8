"""VisPruner against a slow loop written from the paper."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cosine_similarity

from vlm_prune.pruning.received import in_tower
from vlm_prune.pruning.vispruner import VisPruner, without_duplicates
from vlm_prune.vlm.common.errors import InputError


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


def test_reduce_equals_the_papers_loop(vision):
    """Half by attention; of the rest the last ones without duplicates. In fp64, which no tie decides."""
    vision = replace(vision, features=vision.features.double())
    kept = VisPruner(budget=64).reduce(vision)
    attention = in_tower(vision, "cls")
    for image, features in enumerate(vision.features):
        ranked = sorted(range(576), key=lambda i: -float(attention[image, i]))
        important, left = ranked[:32], sorted(ranked[32:])
        similar = cosine_similarity(features[:, None], features[None], -1).tolist()
        while len(left) > 32:
            even, odd = left[::2], left[1::2]
            closest = {i: max(similar[i][j] for j in odd) for i in even}
            worst = sorted(even, key=lambda i: -closest[i])[: min(8, len(left) - 32)]
            left = [i for i in left if i not in worst]
        assert kept.indices[image].tolist() == sorted(important + left)
        assert torch.equal(kept.features[image], vision.projected[image, kept.indices[image]])


@pytest.mark.parametrize(("budget", "important"), [(61, 30), (63, 31)])
def test_the_released_rule_equals_a_loop(budget, important, vision):
    """Tokens are split in the order of their attention; what is left of the even ones comes first."""
    vision = replace(vision, features=vision.features.double())
    kept = VisPruner(budget=budget, released=True).reduce(vision)
    attention = in_tower(vision, "cls")
    for image, features in enumerate(vision.features):
        ranked = sorted(range(576), key=lambda i: -float(attention[image, i]))
        left = ranked[important:]
        similar = cosine_similarity(features[:, None], features[None], -1).tolist()
        while len(left) > budget - important:
            even, odd = left[::2], left[1::2]
            closest = {i: max(similar[i][j] for j in odd) for i in even}
            removed = min(8, len(left) - (budget - important))
            left = sorted(even, key=lambda i: -closest[i])[removed:] + odd
        assert kept.indices[image].tolist() == sorted(ranked[:important] + left)
    plain = VisPruner(budget=budget).reduce(vision)
    assert any((a != b).any() for a, b in zip(kept.indices, plain.indices, strict=True))


def test_all_by_attention_is_the_cls_ranking(vision):
    kept = VisPruner(budget=64, important=1).reduce(vision)
    expected = in_tower(vision, "cls").topk(64).indices.sort().values
    assert torch.equal(torch.stack(kept.indices), expected)


def test_a_step_of_zero_is_refused():
    with pytest.raises(InputError, match="step"):
        VisPruner(step=0)


@pytest.mark.parametrize("important", [-0.5, 1.5])
def test_no_share_of_important_tokens_is_refused(important):
    with pytest.raises(InputError, match="important"):
        VisPruner(important=important)
