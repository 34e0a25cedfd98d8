"""CoIn: its greedy steps against the objective, with determinants computed outright."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cosine_similarity

from vlm_prune.pruning.coin import RIDGE, CoIn, volume
from vlm_prune.pruning.select import dpp
from vlm_prune.vlm.common.errors import InputError


@pytest.mark.parametrize("alpha", [0.2, 0.5, 1.0])
def test_greedy_steps_maximize_the_objective(alpha):
    torch.manual_seed(0)
    tokens = torch.randn(2, 15, 12, dtype=torch.float64)
    scores = torch.rand(2, 15, dtype=torch.float64)
    chosen = dpp(volume(tokens, scores, alpha), 8)
    for image in range(2):
        own, score, ridge = tokens[image], scores[image], RIDGE * tokens[image].square().sum() / 15

        def coverage(members, own=own, ridge=ridge):
            gram = own[members] @ own[members].T
            return float(torch.logdet(gram + ridge * torch.eye(len(members))))

        single = [coverage([i]) for i in range(15)]
        low, high = min(single), max(single)
        picked = []
        while len(picked) < 8:
            sets = {i: [*picked, i] for i in range(15) if i not in picked}
            value = {
                i: (1 - alpha) * float(score[s].sum())
                + alpha * (coverage(s) - len(s) * low) / (high - low)
                for i, s in sets.items()
            }
            picked.append(max(value, key=value.__getitem__))
        assert chosen[image].tolist() == picked


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_informativeness_equals_the_papers_loop(beta, vision):
    torch.manual_seed(0)
    question = torch.randn(4, vision.projected.shape[-1])
    scores = CoIn(beta=beta).informativeness(vision.projected, question.mean(0)[None])
    for image, tokens in enumerate(vision.projected):
        norms = [float(t.norm()) for t in tokens]
        cosines = [float(cosine_similarity(t, question.mean(0), 0)) for t in tokens]
        expected = [
            beta * (n - min(norms)) / (max(norms) - min(norms))
            + (1 - beta) * (c - min(cosines)) / (max(cosines) - min(cosines))
            for n, c in zip(norms, cosines, strict=True)
        ]
        torch.testing.assert_close(scores[image], torch.tensor(expected))


def test_the_question_decides(vision):
    """The token that equals the question is kept; without a question norms and volume decide."""
    with_question = replace(vision, question=lambda: tuple(vision.projected[:, 7:8]))
    kept = CoIn(budget=1, beta=0.0, alpha=0.1).reduce(with_question).indices
    assert [int(p) for p in kept] == [7, 7]
    alone = CoIn(budget=5, beta=0.0).reduce(vision).indices[0].tolist()
    assert alone == CoIn(budget=5, alpha=1.0).reduce(vision).indices[0].tolist()


@pytest.mark.parametrize("wrong", [{"alpha": 0.0}, {"alpha": 1.5}, {"beta": -0.1}])
def test_bad_weights_are_refused(wrong):
    with pytest.raises(InputError, match="alpha must be"):
        CoIn(**wrong)
