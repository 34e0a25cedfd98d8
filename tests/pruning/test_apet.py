"""ApET's three steps against loops, behind the tower and inside the language model."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cosine_similarity

from vlm_prune.pruning.apet import Apet, ApetInside, approximation_error, farthest_points
from vlm_prune.pruning.registry import build
from vlm_prune.vlm.common.errors import InputError


def slow(tokens, keep, basis):
    """One image, float64: kept tokens, and for each the tokens whose mean it becomes."""
    tokens = tokens.double()
    chosen = [int((tokens - tokens.mean(0)).norm(dim=1).argmax())]
    while len(chosen) < min(basis, keep):
        gaps = [min(float((t - tokens[c]).norm()) for c in chosen) for t in tokens]
        chosen.append(max(range(len(gaps)), key=gaps.__getitem__))
    matrix = tokens[chosen].T  # as in the paper, V = B A
    errors = [float((t - matrix @ torch.linalg.lstsq(matrix, t).solution).norm()) for t in tokens]
    rest = sorted(set(range(len(tokens))) - set(chosen), key=lambda i: -errors[i])
    kept = sorted(chosen + rest[: keep - len(chosen)])
    groups = {place: [place] for place in kept}
    for token in set(range(len(tokens))) - set(kept):
        similar = [float(cosine_similarity(tokens[token], tokens[k], 0)) for k in kept]
        groups[kept[max(range(len(kept)), key=similar.__getitem__)]].append(token)
    return groups


@pytest.mark.parametrize("budget", [5, 40])
def test_compression_equals_the_papers_loop(budget, vision):
    kept = Apet(budget=budget).reduce(vision)
    for image, own in enumerate(vision.features):
        groups = slow(own, budget, 10)
        assert kept.indices[image].tolist() == list(groups)
        means = torch.stack([own[sorted(group)].mean(0) for group in groups.values()])
        torch.testing.assert_close(kept.features[image], vision.projector(means))


def test_inside_the_model_hidden_states_are_compressed():
    torch.manual_seed(0)
    tokens = SimpleNamespace(features=torch.randn(2, 30, 8))
    kept = ApetInside(basis=4).reduce(tokens, 9)
    for image, own in enumerate(tokens.features):
        groups = slow(own, 9, 4)
        assert kept.indices[image].tolist() == list(groups)
        means = torch.stack([own[sorted(group)].mean(0) for group in groups.values()])
        torch.testing.assert_close(kept.features[image], means)


def test_equal_tokens_are_a_basis_of_low_rank():
    """An image of one color has fewer different tokens than the basis."""
    torch.manual_seed(0)
    tokens = torch.randn(1, 3, 8)[:, [0, 1, 1, 2, 0, 2, 1]]
    chosen = farthest_points(tokens, 5)
    assert len(set(chosen[0].tolist())) == 5
    error = approximation_error(tokens, tokens[:, chosen[0]])
    torch.testing.assert_close(error, torch.zeros(1, 7), atol=1e-5, rtol=0)


def test_the_authors_two_stages_keep_their_counts():
    """96 of 576 tokens enter and 32 are left behind layer 16 of 32, for a mean of 64."""
    method = build("apet+apet@16", budget=64)
    assert method.entering(576) == 96
    assert [(cut.layer, cut.keep) for cut in method.cuts(576, 32)] == [(16, 32)]


def test_a_basis_of_nothing_is_refused():
    for method in (Apet, ApetInside):
        with pytest.raises(InputError, match="basis 0 is out of range"):
            method(basis=0)
    with pytest.raises(InputError, match="layer 40"):
        ApetInside(layer=40)
