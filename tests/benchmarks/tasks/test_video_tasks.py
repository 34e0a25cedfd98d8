"""The embedded tasks about videos: reproducible, with answers that what moves decides."""

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from vlm_prune.benchmarks.tasks import (
    TASKS,
    VIDEO,
    appears,
    direction,
    event,
    middle,
    order,
    passes,
)
from vlm_prune.benchmarks.tasks.moving import FRAME_SIDE, FRAMES, NOISE, clip_of
from vlm_prune.pruning.registry import build
from vlm_prune.vlm.tokens import VisionTokens


def movies(module, count=40):
    return [module.ask(np.random.default_rng(seed)) for seed in range(count)]


@pytest.mark.parametrize("name", VIDEO)
def test_the_same_arguments_give_the_same_video_and_others_another(name):
    first, second, other = (TASKS[name].sample(3, seed=seed, split="val") for seed in (1, 1, 2))
    (clip,), (again,), (another,) = first.videos, second.videos, other.videos
    assert clip.frames.shape == (
        event.LONG if name == "event" else FRAMES,
        FRAME_SIDE,
        FRAME_SIDE,
        3,
    )
    assert clip.times[:3] == (0.0, 0.5, 1.0) and clip.duration == len(clip.frames) / 2
    np.testing.assert_array_equal(clip.frames, again.frames)
    assert first.answer == second.answer and not first.images
    assert not np.array_equal(clip.frames, another.frames)
    assert first.messages()[0]["content"][0] == {"type": "video"}
    assert TASKS[name].score(first.answer, first.answer) == 1.0
    assert TASKS[name].score("something else", first.answer) == 0.0


@pytest.mark.parametrize("module", [appears, passes, direction, middle, event, order])
def test_no_single_answer_is_worth_much_and_names_are_unique(module):
    found = movies(module, 120)
    answers = Counter(movie.question.answer for movie in found)
    assert answers.most_common(1)[0][1] / 120 < 0.65
    for movie in found:
        assert len({actor.name for actor in movie.actors}) == len(movie.actors)


def test_what_is_drawn_is_where_and_when_the_path_says():
    """Frames differ by more than noise exactly where something is seen in one of them alone."""
    movie = movies(event, 1)[0]
    clip = clip_of(np.random.default_rng(0), "val", movie.actors)
    (moment,) = movie.actors[2].seen
    changed = [
        int((np.abs(after.astype(int) - before) > 2 * NOISE).sum())
        for before, after in zip(clip.frames[:-1], clip.frames[1:], strict=True)
    ]
    assert [n for n, count in enumerate(changed) if count] == [moment - 1, moment]


def test_the_answers_are_what_happens():
    for movie in movies(appears):
        starts = {actor.seen[0]: actor.name for actor in movie.actors}
        which = min if movie.question.subset == "first" else max
        assert movie.question.answer == starts[which(starts)]
        assert f"appears {movie.question.subset}?" in movie.question.text
    for movie in movies(passes):
        ((actor,), seen) = movie.actors, movie.actors[0].seen
        runs = 1 + sum(after - before > 1 for before, after in itertools.pairwise(seen))
        assert movie.question.answer == str(runs)
        assert f"the {actor.name} pass" in movie.question.text
    for movie in movies(direction):
        mover = next(actor for actor in movie.actors if f"the {actor.name} " in movie.question.text)
        across, down = np.subtract(mover.path[-1], mover.path[0])
        way = ("left", "right")[int(across > 0)] if across else ("up", "down")[int(down > 0)]
        assert movie.question.answer == way
    for movie in movies(middle):
        shown = next(actor for actor in movie.actors if FRAMES // 2 in actor.seen)
        assert movie.question.answer == shown.name
        assert sorted(frame for actor in movie.actors for frame in actor.seen) == [*range(FRAMES)]
    for movie in movies(order):
        times = {actor.name: actor.seen[0] for actor in movie.actors}
        one, other = movie.question.text[9:-1].split(" appear before the ")
        assert movie.question.answer == ("yes" if times[one] < times[other] else "no")
        assert all(len(actor.seen) == 2 for actor in movie.actors)


def tokens_of(clip):
    """Blocks of 28 x 28 pixels as tokens: colors of their 4 x 4 parts, less gray."""
    side = FRAME_SIDE // 28
    parts = clip.frames.reshape(len(clip.frames), side, 4, 7, side, 4, 7, 3).mean((3, 6)) - 128
    features = torch.tensor(parts.transpose(0, 1, 3, 2, 4, 5).reshape(1, -1, 48)).float()
    return VisionTokens(
        features=features, projected=features, grids=((side, side),) * len(clip.frames), seeds=(0,),
        projector=torch.nn.Identity(), query_key=None, has_cls=False, frames=len(clip.frames),
    )  # fmt: skip


def test_the_event_tells_fewer_frames_from_methods_that_keep_what_changes():
    """A tenth of 64 frames seldom has the one in which the object is seen."""
    kept = {"evs": 0, "frames": 0}
    for seed, movie in enumerate(movies(event, 12)):
        vision = tokens_of(clip_of(np.random.default_rng(seed), "test", movie.actors))
        size = vision.projected.shape[1] // event.LONG
        (moment,) = movie.actors[2].seen
        frames = vision.projected[0].unflatten(0, (event.LONG, size))
        # the tokens that show the object: those that differ most from the frame before
        shown = (frames[moment] - frames[moment - 1]).norm(dim=1).argmax() + moment * size
        for name in kept:
            (indices,) = replace(build(name), budget=0.1).select(vision).indices
            kept[name] += int(shown in indices)
    assert kept["evs"] >= 11 and kept["frames"] <= 4
