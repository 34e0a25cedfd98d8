"""FastVID against loops over its definition."""

from itertools import pairwise

import pytest
import torch
from torch.nn.functional import cosine_similarity
from video_loops import attention_of, peaks

from vlm_prune.pruning.fastvid import FastVID
from vlm_prune.pruning.video import segment_starts
from vlm_prune.vlm.common.errors import InputError


@pytest.mark.parametrize("segments", [1, 4, 8])
def test_selection_and_merging_equal_the_papers_loop(segments, clips):
    """Five tokens of each of ten frames: three salient, and two for the segment."""
    kept = FastVID(budget=50, segments=segments, threshold=0.5).reduce_video(clips)
    for video, frames in enumerate(clips.projected.double().unflatten(1, (10, 12))):
        means = [frame.mean(0) for frame in frames]
        alike = [float(cosine_similarity(means[t], means[t + 1], dim=0)) for t in range(9)]
        cuts = {t for t in range(9) if alike[t] < 0.5}
        cuts |= {*sorted(range(9), key=lambda t: alike[t])[: segments - 1]}
        bounds = [0, *sorted(t + 1 for t in cuts), 10]
        expected = {}
        for first, end in pairwise(bounds):
            salient = {}
            for t in range(first, end):
                attention = attention_of(clips)[video, t].tolist()
                salient[t] = sorted(range(12), key=lambda i: -attention[i])[:3]
                expected |= {12 * t + i: frames[t, i] for i in salient[t]}
            anchors = [t for t in range(first, end) if (end - 1 - t) % 4 == 0]
            # an anchor's nine other tokens hold the two of each of at most four frames
            total, targets, rest = 2 * (end - first), [], []
            for number, t in enumerate(anchors):
                share = total * (number + 1) // len(anchors) - total * number // len(anchors)
                free = [i for i in range(12) if i not in salient[t]]
                targets += [(t, free[i]) for i in peaks(frames[t, free], share, 4)]
            for t in range(first, end):
                rest += [(t, i) for i in range(12) if i not in salient[t] and (t, i) not in targets]
            groups = {target: [] for target in targets}
            for at in rest:
                near = [float(cosine_similarity(frames[at], frames[to], dim=0)) for to in targets]
                groups[targets[near.index(max(near))]].append(frames[at])
            for (t, i), group in groups.items():
                weight = max(0.6, 1 / (len(group) + 1))
                mean = torch.stack(group).mean(0) if group else frames[t, i]
                expected[12 * t + i] = weight * frames[t, i] + (1 - weight) * mean
        assert kept.indices[video].tolist() == sorted(expected)
        ours = torch.stack([expected[at] for at in sorted(expected)]).float()
        torch.testing.assert_close(kept.features[video], ours)


@pytest.mark.parametrize("budget", [3, 10, 101, 120])
def test_the_budget_is_met_where_frames_are_all_but_full_or_empty(budget, clips):
    for indices in FastVID(budget=budget).reduce_video(clips).indices:
        assert len(set(indices.tolist())) == budget
        assert indices.tolist() == sorted(indices.tolist())


@pytest.mark.parametrize(
    "options",
    [
        {"segments": 0},
        {"stride": 0},
        {"neighbors": 0},
        {"context": 1.0},
        {"context": -0.5},
        {"weight": 2.0},
        {"weight": -0.5},
    ],
)
def test_values_out_of_range_are_refused(options):
    (name,) = options
    with pytest.raises(InputError, match=f"{name} .* is out of range"):
        FastVID(**options)


@pytest.mark.parametrize(
    ("fewest", "starts"), [(1, [0]), (2, [0, 2]), (3, [0, 2, 3]), (9, [0, 1, 2, 3])]
)
def test_segments_start_where_frames_are_least_alike(fewest, starts):
    angles = torch.tensor([0.0, 0.1, 1.0, 1.3])
    means = torch.stack([angles.cos(), angles.sin()], 1)
    assert segment_starts(means, fewest, threshold=0.0) == starts
