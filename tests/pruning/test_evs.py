"""EVS against a loop over its definition."""

import pytest
from torch.nn.functional import cosine_similarity

from vlm_prune.pruning.evs import EVS


@pytest.mark.parametrize("budget", [12, 13, 30, 119, 120])
def test_selection_equals_the_papers_loop(budget, clips):
    kept = EVS(budget=budget).reduce_video(clips)
    for video, tokens in enumerate(clips.projected.double()):
        change = [2.0**10] * 12
        for token in range(12, 120):
            alike = cosine_similarity(tokens[token], tokens[token - 12], dim=0)
            change.append(1 - float(alike))
        order = sorted(range(120), key=lambda token: (-change[token], token))
        assert kept.indices[video].tolist() == sorted(order[:budget])
        assert (kept.features[video] == clips.projected[video, kept.indices[video]]).all()


def test_below_a_frame_the_first_is_thinned(clips):
    assert EVS(budget=3).reduce_video(clips).indices[0].tolist() == [2, 6, 10]
