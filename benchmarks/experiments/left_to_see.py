"""What methods leave to be seen of videos: the share of questions that the kept tokens still answer.

A reader that recognizes everything and knows from when each token is would answer this share. It
bounds the accuracy of any model, and needs none that has learned to answer.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlm_prune.benchmarks.stats.paired import TaskScores, difference
from vlm_prune.benchmarks.stats.table import percent, points
from vlm_prune.benchmarks.tasks import appears, direction, event, middle, order, passes
from vlm_prune.benchmarks.tasks.base import Split, shares
from vlm_prune.benchmarks.tasks.moving import ACROSS, Actor, Movie, film, ink_by_token
from vlm_prune.pruning.base import VisionPruner
from vlm_prune.pruning.registry import build
from vlm_prune.vlm.budget import Budget
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.families import family_of
from vlm_prune.vlm.tiny.video import video_model
from vlm_prune.vlm.tokens import VisionTokens

MODULES = (appears, passes, direction, middle, event, order)


@dataclass(frozen=True)
class MovieQuestion:
    """A movie with its question, and which tokens show each actor, (actors, frames, S)."""

    task: str
    movie: Movie
    tokens: VisionTokens
    shown: Tensor


def tokens_showing(actor: Actor, drawing: NDArray[np.float32]) -> Tensor:
    """Returns the tokens that show a thing, (frames, S): at least half as much of it as the one that
    shows most of it in that frame.

    Args:
        actor: the thing.
        drawing: its opacity, (height, width).
    """
    shown = torch.zeros(len(actor.path), ACROSS * ACROSS, dtype=torch.bool)
    for frame in actor.seen:
        ink = ink_by_token(drawing, actor.path[frame] or (0.0, 0.0))
        covered = torch.from_numpy(ink).flatten()
        shown[frame] = covered >= covered.max() / 2
    return shown


def is_answered(task: str, movie: Movie, kept: Tensor) -> bool:
    """Returns whether the question is answered right from what is left of each thing.

    Args:
        task: its name.
        movie: with the question.
        kept: which tokens that show each actor are left, (actors, frames, S).
    """
    seen = {
        actor.name: left.any(1).nonzero()[:, 0].tolist()
        for actor, left in zip(movie.actors, kept, strict=True)
    }
    found = {name: frames for name, frames in seen.items() if frames}
    text, gold = movie.question.text.rstrip("?").split(), movie.question.answer
    if task == "passes":
        (frames,) = seen.values()
        return len({frame // passes.TURN for frame in frames}) == int(gold)
    if task == "order":
        one, other = (found.get(word) for word in text if word in seen)
        # what is seen at the same time first is not in an order
        if one is None or other is None or one[0] == other[0]:
            return False
        return ("yes" if one[0] < other[0] else "no") == gold
    if task == "direction":
        number = next(k for k, actor in enumerate(movie.actors) if actor.name in text)
        return _way(kept[number]) == gold
    if gold not in found:
        return False
    # the thing that is asked for has the lowest of these, alone
    rank: Callable[[list[int]], float] = {
        "appears": lambda frames: frames[0] if movie.question.subset == "first" else -frames[0],
        "event": len,
        "middle": lambda frames: min(abs(f - (kept.shape[1] - 1) / 2) for f in frames),
    }[task]
    ranks = {name: rank(frames) for name, frames in found.items()}
    return all(ranks[gold] < other for name, other in ranks.items() if name != gold)


def _way(left: Tensor) -> str:
    """Returns where a thing moves, given which of its tokens are left, (frames, S)."""
    frames = left.any(1).nonzero()[:, 0]
    if len(frames) < 2:
        return ""
    cells = left.view(len(left), ACROSS, ACROSS).float()
    rows, columns = (
        torch.stack([(cells[f].sum(axis) * torch.arange(ACROSS)).sum() / cells[f].sum() for f in
                     (frames[0], frames[-1])])
        for axis in (1, 0)
    )  # fmt: skip
    down, across = float(rows[1] - rows[0]), float(columns[1] - columns[0])
    if abs(down) == abs(across):
        return ""
    if abs(across) > abs(down):
        return "right" if across > 0 else "left"
    return "down" if down > 0 else "up"


def questions(limit: int, seed: int = 0, split: Split = "test") -> Iterator[MovieQuestion]:
    """Yields questions about videos, as the tasks draw them, encoded by the tower of `tiny`.

    Args:
        limit: how many in all.
        seed: of the tasks.
        split: of the photographs.

    Raises:
        InputError: if these are fewer questions than tasks.
    """
    model, processor = video_model()
    family = family_of(model.eval())
    modules = {module.TASK.name: module for module in MODULES}
    if limit < len(modules):
        raise InputError(f"limit {limit} is below one question for {len(modules)} tasks")
    for name, number in shares(list(modules), limit).items():
        for index in range(number):
            rng = modules[name].TASK.generator(index, seed, split)
            movie = modules[name].ask(rng)
            clip, drawings = film(rng, split, movie.actors)
            pixels = processor.video_processor([clip.frames], return_tensors="pt")
            with torch.inference_mode():
                vision = family.encode(pixel_values_videos=pixels["pixel_values_videos"])
            shown = torch.stack(
                [
                    tokens_showing(actor, drawing)
                    for actor, drawing in zip(movie.actors, drawings, strict=True)
                ]
            )
            yield MovieQuestion(name, movie, vision.groups[0].tokens, shown)


def answers(
    methods: Sequence[str], budgets: Sequence[Budget], samples: Iterable[MovieQuestion]
) -> dict[tuple[str, Budget], TaskScores]:
    """Returns by method and budget which questions of each task what is kept still answers, 1 or 0.

    Args:
        methods: that choose before the language model.
        budgets: of each video.
        samples: the questions.

    Raises:
        InputError: if a method does not choose there.
    """
    pruners: dict[tuple[str, Budget], VisionPruner] = {}
    for budget in budgets:
        for method in methods:
            pruner = replace(build(method), budget=budget)
            if not isinstance(pruner, VisionPruner):
                raise InputError(f"{method} does not choose before the language model; give evs")
            pruners[method, budget] = pruner
    right: dict[tuple[str, Budget], dict[str, list[float]]] = {key: {} for key in pruners}
    for question in samples:
        for key, pruner in pruners.items():
            with torch.inference_mode():
                (indices,) = pruner.select(question.tokens).indices
            left = torch.zeros(question.tokens.projected.shape[1], dtype=torch.bool)
            left[indices] = True
            kept = question.shown & left.view(1, *question.shown.shape[1:])
            hit = is_answered(question.task, question.movie, kept)
            right[key].setdefault(question.task, []).append(float(hit))
    return {
        key: {task: np.array(hits) for task, hits in found.items()} for key, found in right.items()
    }


def left_to_see_table(
    found: Mapping[tuple[str, Budget], TaskScores], control: str
) -> list[list[str]]:
    """Returns a header and a row for each method and budget.

    Args:
        found: what `answers` gives.
        control: the method that others are compared with, on the same questions.
    """
    names = list(next(iter(found.values())))
    rows = [["method", "budget", *names, "mean", f"points more than {control} [95 %]"]]
    for (method, budget), ours in found.items():
        means = [float(ours[name].mean()) for name in names]
        gain = points(*difference(ours, found[control, budget]))
        shown = [percent(mean) for mean in [*means, sum(means) / len(means)]]
        rows.append([method, str(budget), *shown, gain if method != control else ""])
    return rows
