"""What methods hold beside the tokens of a video while they choose, and in which precision."""

from dataclasses import replace

import pytest
import torch

from vlm_prune.benchmarks.speed.selection_memory import PeakBytes
from vlm_prune.pruning.registry import build
from vlm_prune.vlm.tokens import as_is


def test_the_peak_is_that_of_what_lives():
    given, outside = torch.ones(1000), torch.ones(1000)
    with PeakBytes([given]) as held:
        one = given + 1
        view = one[:10]
        del one
        view += 1
        given[:5].clone()
        outside[:10].clone()
    assert held.peak == 4000 + 40


@pytest.mark.parametrize(
    "name",
    [
        *("evs", "vidcom2", "v-cast", "fastvid", "flashvid", "holitom", "frames", "pool", "random"),
        *("divprune", "visionzip", "fopru", "cdpruner", "scope"),
    ],
)
def test_selection_holds_less_than_one_and_a_half_times_the_tokens(name, clips):
    """N x N over 2,000 tokens of 64 numbers would be 32 times the tokens."""
    draw = torch.Generator().manual_seed(0)
    frames, size, width = 100, 20, 64
    tokens = torch.randn(1, frames * size, width, generator=draw)
    query = torch.randn(frames, 2, size, 8, generator=draw)
    vision = replace(
        clips, projected=tokens, features=tokens, frames=frames, grids=((4, 5),) * frames,
        seeds=(1,), available=frames * size, query_key=lambda: (query, query),
        pool=as_is,
    )  # fmt: skip
    with PeakBytes([tokens, query]) as held:
        build(name, budget=0.1).select(vision)
    assert 0 < held.peak < 1.5 * tokens.nbytes


@pytest.mark.parametrize("name", ["evs", "vidcom2", "v-cast", "fastvid", "flashvid", "holitom"])
def test_tokens_in_bf16_are_chosen_as_the_same_values_in_fp32(name, clips):
    half = replace(clips, projected=clips.projected.bfloat16())
    whole = replace(clips, projected=half.projected.float())
    kept, expected = (build(name, budget=30).select(own) for own in (half, whole))
    assert all(map(torch.equal, kept.indices, expected.indices))
    assert kept.features[0].dtype == torch.bfloat16


def test_a_video_of_several_keeps_its_frames_unless_part_of_it_is_left_out(clips):
    """The second of two: all its tokens, or the first half of them."""
    tokens = clips.projected.shape[1]
    every = torch.ones(tokens, dtype=torch.bool)
    half = torch.arange(tokens) < tokens // 2
    whole, part = clips.of(1, every), clips.of(1, half)
    assert (whole.frames, part.frames) == (clips.frames, 0)
    assert torch.equal(whole.keys()[0], clips.keys()[1])
    assert torch.equal(whole.in_frames([3, 5]).keys(), clips.in_frames([3, 5]).keys()[2:])
    assert torch.equal(part.keys()[0], clips.keys()[1, half])
