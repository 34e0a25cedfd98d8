"""DivPrune's greedy max-min selection against a slow loop written from the paper."""

import torch
from torch.nn.functional import cosine_similarity

from vlm_prune.pruning.divprune import DivPrune
from vlm_prune.pruning.select import max_min


def test_selection_equals_the_papers_loop():
    torch.manual_seed(0)
    features = torch.randn(3, 20, 8)
    chosen = max_min(features, 9)
    for image in range(3):
        distance = [
            [1 - float(cosine_similarity(a, b, 0)) for b in features[image]]
            for a in features[image]
        ]
        lonely = [min(distance[i][j] for j in range(20) if j != i) for i in range(20)]
        picked = [lonely.index(max(lonely))]
        while len(picked) < 9:
            nearest = {i: min(distance[i][j] for j in picked) for i in range(20) if i not in picked}
            picked.append(max(nearest, key=nearest.__getitem__))
        assert chosen[image].tolist() == picked


def closest_pair(features):
    return cosine_similarity(features[:, None], features[None], -1).fill_diagonal_(-1).amax()


def test_kept_tokens_differ_more_than_the_first_ones(vision):
    kept = DivPrune(budget=64).reduce(vision)
    for features, projected in zip(kept.features, vision.projected, strict=True):
        assert len(features) == 64
        assert closest_pair(features) < closest_pair(projected[:64])
