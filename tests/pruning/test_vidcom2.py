"""VidCom2 against a loop over its definition."""

from math import exp

import pytest
import torch

from vlm_prune.pruning.vidcom2 import VidCom2
from vlm_prune.vlm.common.errors import InputError


def kernel(one, other):
    squared = float((one - other).square().sum())
    return sum(exp(-squared / (2 * width)) for width in (1 / 8, 1 / 4, 1 / 2, 1, 2))


@pytest.mark.parametrize("budget", [4, 10, 33, 60, 120])
def test_selection_equals_the_papers_loop(budget, clips):
    kept = VidCom2(budget=budget).reduce_video(clips)
    for video, tokens in enumerate(clips.projected.double()):
        varying = [float(tokens[:, c].var(correction=0)) for c in range(16)]
        half = tokens[:, sorted(range(16), key=lambda c: (varying[c], c))[:8]]
        half = torch.stack([own / own.norm() for own in half])
        whole = half.mean(0)
        like_video = [kernel(own, whole) for own in half]
        redundancy = [
            like_video[i] + kernel(half[i], half[i // 12 * 12 : i // 12 * 12 + 12].mean(0))
            for i in range(120)
        ]
        standing_out = torch.tensor(
            [-sum(like_video[12 * f : 12 * f + 12]) / 12 for f in range(10)], dtype=torch.double
        )
        share = ((standing_out - standing_out.max()) / 0.01).softmax(0)
        chosen = set()
        for frame in range(10):
            wanted = 12 * min(1.0, budget / 120 * (1 + float(share[frame] - share.mean())))
            order = sorted(range(12 * frame, 12 * frame + 12), key=redundancy.__getitem__)
            chosen |= {*order[: max(1, round(wanted))]}
        first = {min(range(12 * f, 12 * f + 12), key=redundancy.__getitem__) for f in range(10)}
        while len(chosen) > budget:
            drop = chosen - first or chosen
            chosen.remove(max(drop, key=redundancy.__getitem__))
        while len(chosen) < budget:
            chosen.add(min({*range(120)} - chosen, key=redundancy.__getitem__))
        assert kept.indices[video].tolist() == sorted(chosen)


def test_a_temperature_of_zero_is_refused():
    with pytest.raises(InputError, match="temperature 0.0 is out of range"):
        VidCom2(temperature=0.0)
