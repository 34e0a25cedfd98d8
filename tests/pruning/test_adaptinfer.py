"""AdaptInfer's score and schedule."""

import pytest
import torch

from vlm_prune.pruning.adaptinfer import AdaptInfer, weighted_by_text
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
    torch.testing.assert_close(weighted_by_text(to_text, to_vision), expected)


def test_authors_presets_stand_where_the_code_prunes():
    cuts = AdaptInfer(preset="64").cuts(576, 32)
    assert [(cut.layer, cut.keep) for cut in cuts] == [(2, 133), (11, 27), (21, 3)]
    with pytest.raises(InputError, match="unknown preset"):
        AdaptInfer(preset="63")
