"""ZOO-Prune against slow loops written from the paper's equations."""

import pytest
import torch
from torch.nn.functional import cosine_similarity, gelu, linear

from vlm_prune.pruning.select import diverse, min_max
from vlm_prune.pruning.zoo import Zoo, closed_form, monte_carlo
from vlm_prune.vlm.errors import InputError
from vlm_prune.vlm.tokens import Projector


@pytest.fixture
def projector():
    torch.manual_seed(0)
    weights = [torch.randn(*s, dtype=torch.float64) / 5 for s in [(40, 24), (40,), (32, 40), (32,)]]
    return Projector(weights[0], weights[1], gelu, weights[2], weights[3])


def test_pre_activation_differences_equal_the_literal_ones(projector):
    tokens = torch.randn(2, 7, 24, dtype=torch.float64)
    bank = torch.randn(5, 24, dtype=torch.float64)

    def project(x):
        return linear(gelu(linear(x, projector.w1, projector.b1)), projector.w2, projector.b2)

    h = 0.01
    literal = [
        (project(tokens + h * u) - project(tokens - h * u)).norm(dim=-1) / (2 * h) for u in bank
    ]
    ours = monte_carlo(tokens, projector, bank, h)
    torch.testing.assert_close(ours, torch.stack(literal).mean(0), rtol=1e-11, atol=0)


def test_closed_form_is_the_root_mean_square_limit(projector):
    tokens = torch.randn(1, 6, 24, dtype=torch.float64)
    bank = torch.randn(40_000, 24, dtype=torch.float64)
    bank /= bank.norm(dim=1, keepdim=True)
    exact = closed_form(tokens, projector)
    sampled = monte_carlo(tokens, projector, bank[:4000], 1e-5)
    # the mean of a norm is at most its root mean square, and close to it in many dimensions
    assert (sampled <= exact * 1.01).all()
    assert (sampled > exact * 0.9).all()
    jacobian = torch.func.vmap(
        torch.func.jacrev(
            lambda x: linear(gelu(linear(x, projector.w1, projector.b1)), projector.w2)
        )
    )(tokens[0])
    torch.testing.assert_close(exact[0], jacobian.flatten(1).norm(dim=1) / 24**0.5)


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


def test_min_max_of_equal_scores_is_ones():
    assert torch.equal(min_max(torch.full((1, 4), 3.0)), torch.ones(1, 4))


@pytest.mark.parametrize("wrong", [{"step": 0}, {"directions": 0}, {"combine": "sum"}])
def test_bad_hyperparameters_are_refused(wrong):
    with pytest.raises(InputError):
        Zoo(**wrong)
