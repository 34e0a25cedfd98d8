"""FlashVID against loops over its definition."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.nn.functional import cosine_similarity
from video_loops import attention_of, peaks

from vlm_prune.pruning.flashvid import FlashVID, fitted
from vlm_prune.pruning.registry import build
from vlm_prune.vlm.common.errors import InputError


def chosen(frame, salience, count):
    apart = [
        [(1 - float(cosine_similarity(a, b, dim=0))) * float(salience[j]) for j, b in enumerate(frame)]
        for a in frame
    ]  # fmt: skip
    nearest = [min(apart[i][j] for i in range(12) if i != j) for j in range(12)]
    picked = [max(range(12), key=nearest.__getitem__)]
    while len(picked) < count:
        free = [j for j in range(12) if j not in picked]
        picked.append(max(free, key=lambda j: min(apart[i][j] for i in picked)))
    return sorted(picked)


@pytest.mark.parametrize(("segments", "relevance"), [(1, False), (4, False), (4, True)])
def test_selection_and_merging_equal_the_papers_loop(segments, relevance, clips):
    """Three tokens of each of ten frames that are chosen, and one for all others."""
    method = FlashVID(budget=40, segments=segments, threshold=0.5, relevance=relevance)
    kept = method.reduce_video(clips)
    for video, frames in enumerate(clips.projected.double().unflatten(1, (10, 12))):
        means = [frame.mean(0) for frame in frames]
        alike = [float(cosine_similarity(means[t], means[t + 1], dim=0)) for t in range(9)]
        cuts = {t + 1 for t in range(9) if alike[t] < 0.5}
        cuts |= {t + 1 for t in sorted(range(9), key=lambda t: alike[t])[: segments - 1]}
        salience = attention_of(clips)[video]
        for start, end in pairwise([0, *sorted(cuts), 10]) if relevance else ():
            for t in range(start, end):
                events = [frames[t] @ means[other] for other in range(start, end)]
                salience[t] *= torch.stack(events).mean(0)
        first = [chosen(frame, salience[t], 3) for t, frame in enumerate(frames)]
        expected = {12 * t + i: frames[t, i] for t, own in enumerate(first) for i in own}
        rest = [[i for i in range(12) if i not in own] for own in first]
        groups = {(t, i): [frames[t, i]] for t in range(10) for i in rest[t]}
        merged = 0
        for t in range(9, 0, -1):
            if t in cuts:
                continue
            for i in rest[t]:
                near = [
                    float(cosine_similarity(frames[t, i], frames[t - 1, j], dim=0))
                    for j in rest[t - 1]
                ]
                if max(near) >= 0.8:
                    groups[t - 1, rest[t - 1][near.index(max(near))]] += groups.pop((t, i))
                    merged += 1
        assert merged > 10
        trees = [[i for i in rest[t] if (t, i) in groups] for t in range(10)]
        for t, share in enumerate(fitted([1] * 10, [len(own) for own in trees])):
            tokens = (
                torch.stack([torch.stack(groups[t, i]).mean(0) for i in trees[t]])
                if trees[t]
                else []
            )
            centers = [*range(share)] if share == len(trees[t]) else peaks(tokens, share, 7)
            sums = {c: [tokens[c]] for c in centers}
            for i in range(len(trees[t]) if share else 0):
                if i not in centers:
                    sums[min(centers, key=lambda c: float((tokens[i] - tokens[c]).norm()))].append(
                        tokens[i]
                    )
            for c, own in sums.items():
                expected[12 * t + trees[t][c]] = torch.stack(own).mean(0)
        assert kept.indices[video].tolist() == sorted(expected)
        ours = torch.stack([expected[at] for at in sorted(expected)]).float()
        torch.testing.assert_close(kept.features[video], ours, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("budget", [3, 10, 101, 119, 120])
def test_the_budget_is_met_where_frames_are_all_but_full_or_empty(budget, clips):
    kept = FlashVID(budget=budget).reduce_video(clips)
    for indices in kept.indices:
        assert len(set(indices.tolist())) == budget
        assert indices.tolist() == sorted(indices.tolist())
    if budget == 120:
        torch.testing.assert_close(torch.stack(kept.features), clips.projected)


def test_the_whole_method_cuts_where_its_authors_do():
    """After layer 20 of 28, from 1.25 times the budget to 0.3 of that."""
    whole = build("flashvid+fastv@23", budget=100)
    assert whole.entering(1000) == pytest.approx(125, abs=2)
    (cut,) = whole.cuts(1000, 28)
    assert cut.layer == 20 and cut.keep / whole.entering(1000) == pytest.approx(0.3, abs=0.05)


def test_what_frames_do_not_have_goes_to_others():
    assert fitted([2, 2, 2], [0, 5, 2]) == [0, 4, 2]
    assert fitted([1, 1, 4], [2, 2, 2]) == [2, 2, 2]


@pytest.mark.parametrize("options", [{"segments": 0}, {"neighbors": 0}, {"diverse": 0.0}])
def test_values_out_of_range_are_refused(options):
    (name,) = options
    with pytest.raises(InputError, match=f"{name} .* is out of range"):
        FlashVID(**options)


@pytest.mark.parametrize("fewest", [0, 4, 7, 20])
def test_as_many_tokens_as_wanted_join_none_of_the_frame_before(fewest):
    tokens, rest = torch.ones(5, 4, 3), [torch.arange(4)] * 5
    parents = FlashVID(budget=10).parents(tokens, rest, [0], fewest)
    assert sum(int((joins < 0).sum()) for joins in parents) == max(4, fewest)


def test_a_still_video_gets_its_budget(clips):
    still = replace(clips, projected=clips.projected[:, :12].repeat(1, 10, 1))
    for budget in (40, 50, 90):
        kept = FlashVID(budget=budget, diverse=0.1, segments=1).reduce_video(still)
        assert [len(indices) for indices in kept.indices] == [budget] * len(still.projected)
