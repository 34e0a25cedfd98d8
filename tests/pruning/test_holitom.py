"""HoliTom against loops over its definition."""

from itertools import pairwise, product

import pytest
import torch
from torch.nn.functional import cosine_similarity
from video_loops import attention_of, peaks

from vlm_prune.pruning.holitom import HoliTom, still_windows
from vlm_prune.vlm.common.errors import InputError


def all_windows(still):
    """The best of all ways to cut a video, of equal ones that with the shortest last windows."""
    frames = len(still) + 1

    def gain(bounds):
        return sum(
            (end - first - 1) * sum(all(still[t][i] for t in range(first, end - 1)) for i in range(12))
            for first, end in pairwise(bounds)
            if end - first > 1
        )  # fmt: skip

    ways = [
        [0, *(t + 1 for t in range(frames - 1) if cut[t]), frames]
        for cut in product([False, True], repeat=frames - 1)
    ]
    return list(pairwise(max(ways, key=lambda bounds: (gain(bounds), bounds[-2::-1]))))


@pytest.mark.parametrize("likely", [0.3, 0.7, 0.9, 1.0])
def test_windows_are_the_best_of_all(likely):
    still = torch.rand(8, 12, generator=torch.Generator().manual_seed(4)) < likely
    assert still_windows(still) == all_windows(still.tolist())


def expected_of(frames, attention, threshold, budget):
    """Indices of what is kept of a video (T, 12, d), with its features."""
    count = len(frames)
    alike = [
        [float(cosine_similarity(frames[t, i], frames[t + 1, i], dim=0)) for i in range(12)]
        for t in range(count - 1)
    ]
    windows = all_windows([[own > threshold for own in row] for row in alike])
    places = {
        (first, i): min(alike[t][i] for t in range(first, end - 1))
        for first, end in windows
        for i in range(12)
        if end - first > 1
    }
    lengths, merged, going = {first: end - first for first, end in windows}, set(), 0
    for (first, i), least in sorted(places.items(), key=lambda item: -item[1]):
        going += lengths[first] - 1
        if least <= threshold or going > count * 12 - budget:
            break
        merged.add((first, i))
    groups = []
    for first, end in windows:
        still = [i for i in range(12) if (first, i) in merged]
        groups.append((first, still, True))
        groups += [(t, [i for i in range(12) if i not in still], False) for t in range(first, end)]
    total = sum(len(at) for _, at, _ in groups)
    exact = [budget * len(at) / total for _, at, _ in groups]
    shares = [int(own) for own in exact]
    late = sorted(range(len(groups)), key=lambda g: shares[g] - exact[g])
    for g in late[: budget - sum(shares)]:
        shares[g] += 1
    expected = {}
    for (t, at, is_still), share in zip(groups, shares, strict=True):
        if not is_still:
            best = sorted(at, key=lambda i: -float(attention[t, i]))[:share]
            expected |= {12 * t + i: frames[t, i] for i in best}
            continue
        means = [frames[t : t + lengths[t], i].mean(0) for i in at]
        centers = peaks(means, share, 7) if 0 < share < len(at) else range(share)
        members = {c: [means[c]] for c in centers}
        for i in range(len(at) if share else 0):
            if i not in members:
                near = min(centers, key=lambda c: float((means[i] - means[c]).norm()))
                members[near].append(means[i])
        expected |= {12 * t + at[c]: torch.stack(own).mean(0) for c, own in members.items()}
    return expected, len(merged)


@pytest.mark.parametrize(("threshold", "budget"), [(0.8, 40), (0.9, 40), (0.8, 75), (0.99, 30)])
def test_selection_and_merging_equal_the_papers_loop(threshold, budget, clips):
    kept = HoliTom(budget=budget, threshold=threshold).reduce_video(clips)
    merged = []
    for video, frames in enumerate(clips.projected.double().unflatten(1, (10, 12))):
        own = frames, attention_of(clips)[video], threshold, budget
        expected, count = expected_of(*own)
        merged.append(count)
        assert kept.indices[video].tolist() == sorted(expected)
        ours = torch.stack([expected[at] for at in sorted(expected)]).float()
        torch.testing.assert_close(kept.features[video], ours, atol=1e-5, rtol=1e-5)
    assert (min(merged) >= 10) == (threshold < 0.95)


@pytest.mark.parametrize("budget", [1, 10, 119, 120])
def test_the_budget_is_met_whatever_is_still(budget, clips):
    kept = HoliTom(budget=budget, threshold=-1.0).reduce_video(clips)
    for indices in kept.indices:
        assert len(set(indices.tolist())) == budget
        assert indices.tolist() == sorted(indices.tolist())
    if budget == 120:
        torch.testing.assert_close(torch.stack(kept.features), clips.projected)


@pytest.mark.parametrize("options", [{"threshold": 2.0}, {"neighbors": 0}])
def test_values_out_of_range_are_refused(options):
    (name,) = options
    with pytest.raises(InputError, match=f"{name} .* is out of range"):
        HoliTom(**options)
