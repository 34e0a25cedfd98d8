"""V-CAST against a loop over its definition."""

from math import exp

import pytest
import torch
from torch.nn.functional import cosine_similarity

from vlm_prune.pruning.v_cast import VCast
from vlm_prune.pruning.video import apportioned
from vlm_prune.vlm.common.errors import InputError


@pytest.mark.parametrize("budget", [3, 24, 100, 120])
def test_selection_equals_the_papers_loop(budget, clips):
    kept = VCast(budget=budget).reduce_video(clips)
    for video, tokens in enumerate(clips.projected.double().unflatten(1, (10, 12))):
        means = [frame.mean(0) for frame in tokens]
        turns = [1.0] * 10
        for t in range(1, 9):
            steps = means[t] - means[t - 1], means[t + 1] - means[t]
            turns[t] = 1 - float(cosine_similarity(*steps, dim=0))
        weights = [exp(turn / 0.7) for turn in turns]
        shares = apportioned(torch.tensor(weights), budget, 12)
        assert sum(shares) == budget
        if budget < 30:  # no frame is full: within one token of its share
            exact = [budget * weight / sum(weights) for weight in weights]
            assert all(abs(own - share) < 1 for own, share in zip(exact, shares, strict=True))
        chosen = []
        for t, frame in enumerate(tokens):
            norms = [float(own.norm()) for own in frame]
            scores = [
                1 - float(cosine_similarity(own, means[t], dim=0))
                + (norm - min(norms)) / (max(norms) - min(norms))
                for own, norm in zip(frame, norms, strict=True)
            ]  # fmt: skip
            order = sorted(range(12), key=lambda i: -scores[i])
            chosen += [12 * t + i for i in sorted(order[: shares[t]])]
        assert kept.indices[video].tolist() == chosen


@pytest.mark.parametrize(
    ("weights", "total", "most", "expected"),
    [
        ([1, 1, 1], 5, 9, [2, 2, 1]),
        ([8, 1, 1], 10, 4, [4, 3, 3]),
        ([0, 0, 0], 4, 2, [2, 1, 1]),
        ([5, 0, 0], 6, 2, [2, 2, 2]),
        ([5, 3, 1], 6, 2, [2, 2, 2]),
    ],
)
def test_shares_are_whole_and_limited(weights, total, most, expected):
    assert apportioned(torch.tensor(weights), total, most) == expected


def test_a_temperature_of_zero_is_refused():
    with pytest.raises(InputError, match="temperature 0.0 is out of range"):
        VCast(temperature=0.0)
