"""ZOO-Prune's selection against a slow loop written from the paper's equations."""

import copy

import pytest
import torch
from torch.nn.functional import cosine_similarity, gelu

from vlm_prune.pruning.select import diverse, min_max
from vlm_prune.pruning.zoo import Zoo, ZooExact
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.projector import Projector
from vlm_prune.vlm.tokens import VisionTokens


def test_greedy_selection_equals_the_papers_loop():
    torch.manual_seed(1)
    scores, features = min_max(torch.rand(3, 20)), torch.randn(3, 20, 8)
    chosen = diverse(scores, features, 9)
    for image in range(3):
        picked = [int(scores[image].argmax())]
        while len(picked) < 9:
            gains = [
                -1.0
                if i in picked
                else scores[image, i]
                * (
                    1
                    - max(
                        cosine_similarity(features[image, i], features[image, j], 0) for j in picked
                    )
                )
                for i in range(20)
            ]
            picked.append(int(torch.tensor(gains).argmax()))
        assert chosen[image].tolist() == picked


@pytest.mark.parametrize("combine", ["product", "sensitivity"])
def test_reduce_equals_the_papers_loop_over_the_models_projector(combine, llava, vision):
    """S_i is the mean over u of |M(x_i + h u) - M(x_i - h u)| / 2h; then S_i (1 - max cos) by turns."""
    directions, step, budget = 3, 0.01, 12
    project = copy.deepcopy(llava.model.multi_modal_projector).double()
    generator = torch.Generator().manual_seed(7)
    bank = torch.randn(directions, vision.features.shape[-1], generator=generator).double()
    kept = Zoo(budget=budget, directions=directions, step=step, seed=7, combine=combine).reduce(
        vision
    )
    for image, tokens in enumerate(vision.features.double()):
        sensitivity = torch.zeros(len(tokens), dtype=torch.float64)
        for u in bank:
            u = u / u.square().sum().sqrt()
            with torch.no_grad():
                change = (project(tokens + step * u) - project(tokens - step * u)) / (2 * step)
            sensitivity += change.square().sum(1).sqrt() / directions
        low, high = sensitivity.min(), sensitivity.max()
        score = ((sensitivity - low) / (high - low + 1e-8)).tolist()
        ranked = sorted(range(len(score)), key=lambda i: -score[i])
        picked = ranked[:1]
        projected = vision.projected[image].double()
        closest = cosine_similarity(projected, projected[picked[0]], 1).tolist()
        while len(picked) < budget and combine == "product":
            free = [i for i in range(len(score)) if i not in picked]
            picked.append(max(free, key=lambda i: score[i] * (1 - closest[i])))
            newest = cosine_similarity(projected, projected[picked[-1]], 1).tolist()
            closest = [max(pair) for pair in zip(closest, newest, strict=True)]
        expected = picked if combine == "product" else ranked[:budget]
        assert kept.indices[image].tolist() == sorted(expected)


def test_min_max_of_equal_scores_is_ones():
    assert torch.equal(min_max(torch.full((1, 4), 3.0)), torch.ones(1, 4))


@pytest.mark.parametrize("wrong", [{"step": 0}, {"directions": 0}, {"combine": "sum"}])
def test_bad_hyperparameters_are_refused(wrong):
    with pytest.raises(InputError):
        Zoo(**wrong)


def test_the_closed_form_follows_weights_that_change():
    """The matrix that is kept per projector must not outlive the weights it was made from."""
    torch.manual_seed(2)
    w1, w2 = torch.randn(8, 4), torch.randn(6, 8)

    def vision():
        return VisionTokens(
            features=torch.ones(1, 3, 4), projected=torch.ones(1, 3, 6), grids=((1, 3),), seeds=(0,),
            projector=Projector.of(w1, None, gelu, w2, None), query_key=None,
        )  # fmt: skip

    pruner = ZooExact(budget=1)
    first = pruner.sensitivity(vision())
    torch.testing.assert_close(pruner.sensitivity(vision()), first)
    w2.mul_(2)
    torch.testing.assert_close(pruner.sensitivity(vision()), 2 * first)
    w2 = w2 / 4
    torch.testing.assert_close(pruner.sensitivity(vision()), first / 2)
