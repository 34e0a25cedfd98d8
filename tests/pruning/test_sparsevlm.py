"""SparseVLM's raters, scores and recycling against slow loops written from the paper's equations."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from vlm_prune.pruning.sparsevlm import SparseVLM, density_peaks, raters
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.tokens import AttentionRows


def test_raters_equal_the_papers_loop():
    torch.manual_seed(0)
    image, text = torch.randn(2, 9, 4), torch.randn(2, 5, 4)
    question_mask = torch.tensor([[True] * 5, [False, False, True, True, True]])
    found = raters(image, text, question_mask)
    for row in range(2):
        words = [j for j in range(5) if question_mask[row, j]]
        relevance = dict.fromkeys(words, 0.0)
        for v in image[row]:
            weights = {j: math.exp(float(v @ text[row, j])) for j in words}
            for j in words:
                relevance[j] += weights[j] / sum(weights.values()) / len(image[row])
        mean = sum(relevance.values()) / len(words)
        expected = [j in relevance and relevance[j] >= mean for j in range(5)]
        assert found[row].tolist() == expected
        assert 0 < sum(expected) < len(words)


def test_only_raters_score():
    torch.manual_seed(1)
    query, key = torch.randn(1, 3, 4, 8), torch.randn(1, 3, 10, 8)
    query_mask = torch.tensor([[False, True, False, True]])
    whole = AttentionRows(
        query, key, torch.arange(6, 10)[None], torch.ones(1, 10, dtype=torch.bool),
        image=torch.arange(1, 6)[None], scale=0.5,
    )  # fmt: skip
    tokens = SimpleNamespace(question_rows=lambda queries: whole, query_mask=query_mask)
    expected = torch.zeros(5)
    for head in range(3):
        for row in (1, 3):
            scores = key[0, head, : 7 + row] @ query[0, head, row] * 0.5
            expected += scores.softmax(0)[1:6] / 3 / 2
    torch.testing.assert_close(SparseVLM().score(tokens)[0], expected)


def test_clusters_equal_the_papers_loop():
    torch.manual_seed(2)
    points, k = torch.randn(20, 8, dtype=torch.float64), 5
    centers, group = density_peaks(points, 4, k)
    distance = [[float((a - b).norm()) / 8**0.5 for b in points] for a in points]
    density, peak = [], []
    for i in range(20):
        near = sorted(distance[i][j] for j in range(20) if j != i)[:k]
        density.append(math.exp(-sum(d * d for d in near) / k))
    for i in range(20):
        denser = [distance[i][j] for j in range(20) if density[j] > density[i]]
        peak.append(density[i] * (min(denser) if denser else max(distance[i])))
    expected = sorted(sorted(range(20), key=lambda i: -peak[i])[:4])
    assert centers.tolist() == expected
    nearest = [min(range(4), key=lambda c: distance[i][expected[c]]) for i in range(20)]
    assert group.tolist() == nearest


def test_released_clusters_equal_a_loop():
    """A density is over as many nearest tokens as there are clusters, itself among them."""
    torch.manual_seed(2)
    points, count = torch.randn(20, 8, dtype=torch.float64), 4
    centers, group = density_peaks(points, count, 5, released=True)
    distance = [[float((a - b).norm()) / 8**0.5 for b in points] for a in points]
    density, peak = [], []
    for i in range(20):
        near = sorted(distance[i])[:count]
        density.append(math.exp(-sum(d * d for d in near) / count))
    for i in range(20):
        denser = [distance[i][j] for j in range(20) if density[j] > density[i]]
        peak.append(density[i] * (min(denser) if denser else max(map(max, distance))))
    expected = sorted(sorted(range(20), key=lambda i: -peak[i])[:count])
    assert centers.tolist() == expected
    nearest = [min(range(count), key=lambda c: distance[i][expected[c]]) for i in range(20)]
    assert group.tolist() == nearest


def test_released_clusters_come_back_as_means():
    torch.manual_seed(3)
    features, scores = torch.randn(1, 40, 8), torch.rand(1, 40)
    tokens, keep = SimpleNamespace(features=features), 12
    summed, averaged = (SparseVLM(recycle=0.5, released=released) for released in (False, True))
    summed.score = averaged.score = lambda tokens: scores
    kept, whole = averaged.reduce(tokens, keep), averaged.unmerged_count(40, keep)
    order = scores[0].argsort(descending=True)
    recycled = order[whole:][: int(0.5 * (40 - whole))]
    centers, group = density_peaks(features[0, recycled], keep - whole, 5, released=True)
    for number, center in enumerate(recycled[centers].tolist()):
        members = [
            i for i, own in zip(recycled.tolist(), group.tolist(), strict=True) if own == number
        ]
        at = kept.indices[0].tolist().index(center)
        torch.testing.assert_close(kept.features[0][at], features[0, members].mean(0))
    assert not torch.equal(summed.reduce(tokens, keep).features[0], kept.features[0])


@pytest.mark.parametrize("keep", [1, 2, 7, 12, 39])
def test_best_tokens_stay_and_recycled_ones_are_summed(keep):
    torch.manual_seed(3)
    features, scores = torch.randn(1, 40, 8), torch.rand(1, 40)
    method = SparseVLM(recycle=0.5)
    method.score = lambda tokens: scores
    kept = method.reduce(SimpleNamespace(features=features), keep)
    places = kept.indices[0].tolist()
    assert places == sorted(set(places)) and len(places) == keep
    order = scores[0].argsort(descending=True).tolist()
    unchanged = [
        p
        for p, feature in zip(places, kept.features[0], strict=True)
        if torch.equal(feature, features[0, p])
    ]
    whole = max((k for k in range(keep) if k + method.recycled_count(40 - k) <= keep), default=0)
    assert set(order[:whole]) <= set(unchanged)
    recycled = order[whole:][: max(keep - whole, int(0.5 * (40 - whole)))]
    assert set(places) - set(order[:whole]) <= set(recycled)
    total = features[0, order[:whole] + recycled].sum(0)
    torch.testing.assert_close(kept.features[0].sum(0), total)


def test_without_recycling_it_is_plain_selection():
    features, scores = torch.randn(1, 10, 4), torch.arange(10.0)[None]
    method = SparseVLM(recycle=0)
    method.score = lambda tokens: scores
    kept = method.reduce(SimpleNamespace(features=features), 3)
    assert kept.indices[0].tolist() == [7, 8, 9]
    assert torch.equal(kept.features[0], features[0, 7:])


def test_shares_outside_0_to_1_are_refused():
    with pytest.raises(InputError, match="recycle"):
        SparseVLM(recycle=1.5)


def test_recycled_tokens_are_counted_as_the_paper_counts_them():
    method = SparseVLM(budget=8)
    assert [method.recycled_count(dropped) for dropped in (0, 3, 4, 100, 333)] == [0, 0, 1, 4, 10]
    assert replace(method, clusters=0.0).recycled_count(100) == 0
