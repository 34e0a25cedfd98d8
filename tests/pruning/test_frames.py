"""The control of fewer frames."""

import pytest
import torch

from vlm_prune.pruning.frames import Frames


@pytest.mark.parametrize(
    ("budget", "frames"), [(12, [5]), (24, [2, 7]), (60, [1, 3, 5, 7, 9]), (120, range(10))]
)
def test_whole_frames_are_kept_at_even_distances(budget, frames, clips):
    kept = Frames(budget=budget).reduce_video(clips)
    expected = [12 * frame + token for frame in frames for token in range(12)]
    assert all(own.tolist() == expected for own in kept.indices)
    assert torch.equal(kept.features[1], clips.projected[1, expected])


def test_other_budgets_thin_the_frames(clips):
    indices = Frames(budget=17).reduce_video(clips).indices[0]
    assert torch.bincount(indices // 12).tolist() == [0, 0, 8, 0, 0, 0, 0, 9]
    assert len(set(indices.tolist())) == 17
