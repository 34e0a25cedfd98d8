"""AdaptInfer's score and schedule."""

import pytest
import torch

from vlm_prune.pruning.adaptinfer import AdaptInfer
from vlm_prune.vlm.errors import InputError


def test_score_equals_the_papers_loop():
    torch.manual_seed(0)
    to_text, to_vision = torch.rand(2, 3, 5, 5).tril(), torch.rand(2, 3, 5, 11)
    expected = torch.zeros(2, 11)
    for b in range(2):
        for h in range(3):
            a = to_text[b, h]
            symmetric = a + a.T - torch.diag(a.diag())
            for v in range(11):
                for j in range(5):
                    expected[b, v] += symmetric[:, j].sum() * to_vision[b, h, j, v]
    torch.testing.assert_close(AdaptInfer().score(to_text, to_vision), expected)


@pytest.mark.parametrize("layers", [6, 12, 28, 32, 40])
@pytest.mark.parametrize("budget", [32, 64, 128, 192, 300, 576])
def test_the_mean_over_layers_is_the_budget(layers, budget):
    cuts = AdaptInfer(budget=budget).cuts(576, layers)
    computed, here = [], 576
    for layer in range(layers):
        here = next((cut.keep for cut in cuts if cut.layer == layer), here)
        computed.append(here)
    assert budget - 1 < sum(computed) / layers <= budget
    assert computed == sorted(computed, reverse=True)


def test_authors_presets_stand_where_the_code_prunes():
    cuts = AdaptInfer(preset="64").cuts(576, 32)
    assert [(cut.layer, cut.keep) for cut in cuts] == [(2, 133), (11, 27), (21, 3)]
    with pytest.raises(InputError, match="unknown preset"):
        AdaptInfer(preset="63").cuts(576, 32)
