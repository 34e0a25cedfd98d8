"""An ideal reader answers from whole videos, and not from those that lost what is asked about."""

import numpy as np
import pytest
import torch

from vlm_prune.benchmarks.experiments.left_to_see import (
    ACROSS,
    MODULES,
    answers,
    is_answered,
    left_to_see_table,
    questions,
    tokens_showing,
)
from vlm_prune.benchmarks.tasks import VIDEO, appears, direction, event, middle, order, passes
from vlm_prune.benchmarks.tasks.moving import film
from vlm_prune.pruning.registry import build
from vlm_prune.vlm.common.errors import InputError


def drawn(module, seed):
    """A movie of a task and the tokens that show its things."""
    rng = np.random.default_rng(seed)
    movie = module.ask(rng)
    _, drawings = film(rng, "val", movie.actors)
    pairs = zip(movie.actors, drawings, strict=True)
    return movie, torch.stack([tokens_showing(actor, drawing) for actor, drawing in pairs])


def without(shown, actor, frames):
    """The tokens that are left when some frames of a thing are lost."""
    left = shown.clone()
    left[actor, frames] = False
    return left


def test_whole_videos_answer_every_question():
    assert tuple(sorted(m.TASK.name for m in MODULES)) == tuple(sorted(VIDEO))
    for module in MODULES:
        for seed in range(2 if module is event else 8):
            movie, shown = drawn(module, seed)
            assert is_answered(module.TASK.name, movie, shown), (module, seed)


def test_tokens_that_show_a_thing_lie_where_it_is_drawn():
    movie, shown = drawn(passes, 0)
    (actor,) = movie.actors
    assert shown[0].any(1).nonzero()[:, 0].tolist() == actor.seen
    columns = [shown[0, frame].view(ACROSS, ACROSS).any(0).nonzero() for frame in actor.seen[:3]]
    # it crosses from left to right
    assert [int(c.float().mean().round()) for c in columns] == sorted(
        int(c.float().mean().round()) for c in columns
    )
    assert int(columns[0].max()) < int(columns[2].min())


def test_lost_evidence_is_missed():
    movie, shown = drawn(event, 1)
    moment = movie.actors[2].seen
    assert not is_answered("event", movie, without(shown, 2, moment))
    movie, shown = drawn(middle, 1)
    assert not is_answered("middle", movie, without(shown, 1, movie.actors[1].seen))
    movie, shown = drawn(passes, 1)
    turn = movie.actors[0].seen[:3]
    assert is_answered("passes", movie, without(shown, 0, turn[:2]))
    assert not is_answered("passes", movie, without(shown, 0, turn))
    movie, shown = drawn(order, 1)
    assert is_answered("order", movie, without(shown, 0, movie.actors[0].seen[:1]))
    assert not is_answered("order", movie, without(shown, 0, movie.actors[0].seen))
    movie, shown = drawn(direction, 1)
    number = next(k for k, a in enumerate(movie.actors) if a.name in movie.question.text)
    assert is_answered("direction", movie, without(shown, number, range(4, 12)))
    assert not is_answered("direction", movie, without(shown, number, range(1, 16)))
    movie, shown = next(
        pair for pair in (drawn(appears, k) for k in range(9)) if pair[0].question.subset == "first"
    )
    later = range(movie.actors[1].seen[0] + 1)
    assert not is_answered("appears", movie, without(shown, 0, later))


@pytest.mark.slow
def test_changes_keep_events_that_even_frames_lose():
    found = answers(["frames", "evs", "none"], [0.1], questions(18, split="val"))
    assert {task: len(hits) for task, hits in found["evs", 0.1].items()} == dict.fromkeys(VIDEO, 3)
    assert all(hits.all() for hits in found["none", 0.1].values())
    assert found["evs", 0.1]["event"].sum() > found["frames", 0.1]["event"].sum()
    rows = left_to_see_table(found, "frames")
    assert [row[0] for row in rows] == ["method", "frames", "evs", "none"] and rows[1][-1] == ""


def test_methods_that_choose_elsewhere_are_refused():
    with pytest.raises(InputError, match="does not choose before the language model"):
        answers(["fastv"], [0.1], [])


def test_all_controls_keep_no_more_than_the_budget():
    """Frames of 6 x 6 tokens become 2 x 2, those in the middle of what they show."""
    (question, *_) = questions(6, split="val")
    counts = {}
    for name in ("random", "frames", "pool", "downsample"):
        (indices,) = build(name, budget=64).select(question.tokens).indices
        counts[name] = len(indices)
    assert counts == {"random": 64, "frames": 64, "pool": 64, "downsample": 64}
    assert indices[:5].tolist() == [7, 10, 25, 28, 43]
