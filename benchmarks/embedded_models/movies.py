"""What the embedded video model learns from: few drawn frames of a movie, shown at ever new times.

A movie in which things only come and go has few different frames. Each is drawn and encoded once;
when things are seen, and what is asked, is drawn anew each time.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlm_prune.benchmarks.embedded_models.language import IGNORE, QuestionBlock, Row
from vlm_prune.benchmarks.tasks import appears, direction, event, middle, order, passes
from vlm_prune.benchmarks.tasks.base import Question, Split
from vlm_prune.benchmarks.tasks.moving import (
    ACROSS,
    FRAME_SIDE,
    FRAMES,
    LARGE,
    TOKEN_SIDE,
    Actor,
    at_rest,
    cast,
    ink_by_token,
    noisy,
    paste,
    spots,
)
from vlm_prune.benchmarks.tasks.scenes import background, noun, sprite

LEAST = 0.03  # share of its pixels from which on a token shows a thing
# What a token tells of its thing: how many came before it, whether it is seen for the first time, how
# often it has passed, and where it moves; each with its number of classes.
TIMES = {"rank": 3, "new": 2, "turn": 4, "way": 4}
PlotName = Literal["appears", "order", "event", "middle", "passes", "direction"]
Place = tuple[float, float]
State = tuple[Place | None, ...]
Encode = Callable[[NDArray[np.uint8]], Tensor]


@dataclass
class MovieRow(Row):
    """A row with what its tokens tell of time, (n + 1, len(TIMES)); `IGNORE` where they do not."""

    times: Tensor | None = None


@dataclass
class Shot:
    """A frame: features of its patches by pooled token, (S, 4, width) in fp16, and which tokens show
    each thing, (things, S).
    """

    features: Tensor
    shown: Tensor


@dataclass
class Set:
    """A picture and what moves before it, with every frame that was encoded.

    Args:
        still: the picture, (FRAME_SIDE, FRAME_SIDE, 3).
        things: kind, name and color of each thing.
        drawings: their opacities.
        places: where they stand; the heights of the turns of `passes`; none where they move.
        ways: in which directions they move.
        seed: of the noise.
        shots: frames that are encoded, by where each thing is.
    """

    still: NDArray[np.uint8]
    things: list[tuple[str, str, str]]
    drawings: list[NDArray[np.float32]]
    places: list[Place] = field(default_factory=list)
    ways: list[tuple[str, float]] = field(default_factory=list)
    seed: int = 0
    shots: dict[State, Shot] = field(default_factory=dict)

    def shot(self, state: State, encode: Encode) -> Shot:
        """Returns the frame in which things are at the places of `state`, which is kept."""
        if state not in self.shots:
            picture = self.still.copy()
            shown = torch.zeros(len(state), ACROSS, ACROSS)
            for number, (thing, drawing, at) in enumerate(
                zip(self.things, self.drawings, state, strict=True)
            ):
                if at is None:
                    continue
                paste(picture, drawing, thing[2], at)
                shown[number] = torch.from_numpy(ink_by_token(drawing, at) / TOKEN_SIDE**2)
            rng = np.random.default_rng([self.seed, len(self.shots)])
            self.shots[state] = Shot(encode(noisy(rng, picture)), shown.flatten(1) >= LEAST)
        return self.shots[state]


def make_set(rng: np.random.Generator, plot: PlotName, split: Split = "train") -> Set:
    """Returns a picture and things for movies of a plot.

    Args:
        rng: draws them.
        plot: name of the task whose movies they are for; `appears`, `order` and `event` share theirs.
        split: of the photographs.
    """
    count = {"passes": 1, "direction": 2}.get(plot, 3)
    things = cast(rng, count, "word" if plot == "middle" else "shape")
    drawings = [sprite(rng, kind, name, split, LARGE) for kind, name, _ in things]
    found = Set(background(rng, split, FRAME_SIDE), things, drawings, seed=int(rng.integers(2**31)))
    if plot == "passes":
        found.places = [(0.0, float(at)) for at in rng.uniform(0.1, 0.9, passes.MOST)]
    elif plot == "direction":
        ways = rng.permutation(list(direction.DIRECTIONS))[:2]
        found.ways = [(str(way), float(rng.uniform(0.1, 0.9))) for way in ways]
    else:
        found.places = spots(rng, count)
    return found


def play(
    rng: np.random.Generator, plot: PlotName, found: Set, lengths: tuple[int, ...] = (event.LONG,)
) -> tuple[Actor, ...]:
    """Returns things of a set with paths of a new movie, those that are seen earlier first.

    Args:
        rng: draws the times, and which thing comes first.
        plot: as for `make_set`.
        found: the set.
        lengths: frames that a movie of `event` may have.
    """
    if plot == "passes":
        path = passes.crossings(rng, [height for _, height in found.places])
        return (Actor(*found.things[0], path),)
    if plot == "direction":
        actors = [
            Actor(*thing, direction.lane(*way))
            for thing, way in zip(found.things, found.ways, strict=True)
        ]
        # played backwards it is another movie of the same frames
        turned = -1 if rng.random() < 0.5 else 1
        return tuple(Actor(a.kind, a.name, a.color, a.path[::turned]) for a in actors)
    frames = int(rng.choice(lengths)) if plot == "event" else FRAMES
    plots: dict[str, Callable[[], list[tuple[int, int]]]] = {
        "appears": lambda: appears.appearances(rng),
        "order": lambda: order.sightings(rng, int(rng.integers(2, 4))),
        "event": lambda: event.moments(rng, frames),
        "middle": lambda: middle.thirds(rng),
    }
    times = plots[plot]()
    numbers: list[int] = rng.permutation(len(found.things))[: len(times)].tolist()
    return tuple(
        Actor(*found.things[k], at_rest(found.places[k], frames, first, end))
        for k, (first, end) in zip(numbers, times, strict=True)
    )


def questions_about(
    rng: np.random.Generator, plot: PlotName, actors: tuple[Actor, ...]
) -> list[tuple[str, Question]]:
    """Returns questions about a movie with their kinds: the task's, and training-only ones that lead
    to it. An answer that lists everything in order spells out what the others ask for.

    Args:
        rng: draws their order.
        plot: as for `make_set`.
        actors: in the order in which they are seen.
    """
    found: list[tuple[str, Question]] = []
    names = " ".join(actor.name for actor in actors)
    if plot in ("appears", "order"):
        found += [("appears", appears.about_turn(actors, which)) for which in ("first", "last")]
        pairs = [(a, b) for a in range(len(actors)) for b in range(len(actors)) if a != b]
        for k in rng.permutation(len(pairs))[:1].tolist():
            found.append(("order", order.about_order(actors, *pairs[k])))
            found.append(("earlier", earlier(actors, *pairs[-1 - k])))
        found.append(("listed", Question("Which objects appear?", names)))
    elif plot == "event":
        found.append(("event", event.about_moment(actors)))
    elif plot == "middle":
        found.append(("middle", middle.about_middle(actors)))
        found.append(("listed", Question("Which words are written?", names)))
    elif plot == "passes":
        found.append(("passes", passes.about_passes(actors[0])))
    else:
        found += [("direction", direction.about_direction(actor)) for actor in actors]
    if rng.random() < 0.7:
        return found
    thing = actors[int(rng.integers(len(actors)))]
    question = Question(f"What color is the {noun(thing.name)}?", thing.color)
    return [*found, ("color", question)]


def earlier(actors: tuple[Actor, ...], one: int, other: int) -> Question:
    """Asks which of two things appears first, a training-only question; from its answer `order` is
    one step.

    Args:
        actors: in the order in which they are seen.
        one: number of the thing that is named first.
        other: number of the other one.
    """
    text = f"Which appears first, {actors[one].name} or {actors[other].name}?"
    return Question(text, actors[min(one, other)].name)


@dataclass(frozen=True)
class Sampling:
    """Which tokens of a movie a row has.

    Args:
        extra: tokens beside those of things, at most.
        thinned: share of the rows that lose tokens of things.
        whole: share of the rows that have all tokens.
        lengths: frames that a movie of `event` may have.
        contiguous: share of the rows whose tokens have contiguous positions, not those of the whole
            video.
    """

    extra: int
    thinned: float
    whole: float = 0.0
    lengths: tuple[int, ...] = (event.LONG,)
    contiguous: float = 0.25


def drawn_tokens(rng: np.random.Generator, shown: Tensor, sampling: Sampling) -> Tensor:
    """Draws the indices of the tokens that a row has, in order.

    Args:
        rng: draws them.
        shown: (frames, things, S), which tokens show each thing.
        sampling: how.
    """
    frames, _, size = shown.shape
    if rng.random() < sampling.whole:
        return torch.arange(frames * size)
    flat = shown.transpose(0, 1).flatten(1)
    any_thing = flat.any(0)
    # as if pruned, some rows have more tokens of some frames, and lose tokens of things
    weights = torch.from_numpy(rng.gamma(float(rng.choice([0.3, 3.0])), size=frames))
    drawn = weights[:, None].expand(-1, size).flatten() * torch.from_numpy(
        rng.random(frames * size)
    )
    drawn[any_thing] = -1
    extra = min(int(rng.integers(0, sampling.extra + 1)), int((~any_thing).sum()))
    keep = torch.zeros(frames * size, dtype=torch.bool)
    keep[drawn.topk(extra).indices] = True
    share = rng.uniform(0.25, 1.0) if rng.random() < sampling.thinned else 1.0
    for thing in flat:
        mine = thing.nonzero()[:, 0]
        if not len(mine):
            continue
        chosen = mine[torch.from_numpy(rng.random(len(mine))) < share]
        keep[chosen if len(chosen) else mine[:1]] = True
        # each sighting of a thing leaves a token
        runs = mine // size
        begins = torch.cat([torch.tensor([True]), runs.diff() > 1])
        for first in begins.nonzero()[:, 0].tolist():
            keep[mine[first]] = True
    return keep.nonzero()[:, 0]


def movie_row(
    rng: np.random.Generator,
    plot: PlotName,
    found: Set,
    encode: Encode,
    sampling: Sampling,
    jitter: float,
) -> Row:
    """Makes a row of questions about a new movie of a set.

    Args:
        rng: draws movie, questions and tokens.
        plot: as for `make_set`.
        found: the set.
        encode: from a frame to its features, (S, 4, width).
        sampling: which tokens it has.
        jitter: standard deviation of features between frames that differ in noise alone.
    """
    actors = play(rng, plot, found, sampling.lengths)
    number = {thing[1]: k for k, thing in enumerate(found.things)}
    paths: dict[int, Any] = {number[actor.name]: actor.path for actor in actors}
    states = [
        tuple(paths[k][t] if k in paths else None for k in range(len(found.things)))
        for t in range(len(actors[0].path))
    ]
    different = list(dict.fromkeys(states))
    shots = [found.shot(state, encode) for state in different]
    at = torch.tensor([different.index(state) for state in states])
    shown = torch.stack([shot.shown for shot in shots])[at][:, sorted(paths)]
    if plot == "event":
        # things that stay have more tokens than one question is worth
        still = [sorted(paths).index(number[actor.name]) for actor in actors[:2]]
        share = rng.uniform(0.15, 0.6)
        shown[:, still] &= torch.from_numpy(rng.random((len(states), 2, 1)) < share)
    keep = drawn_tokens(rng, shown, sampling)
    size = shown.shape[-1]
    features = torch.stack([shot.features for shot in shots])[at[keep // size], keep % size]
    noise = torch.from_numpy(rng.standard_normal(features.shape, np.float32)) * jitter
    blocks = [
        QuestionBlock(f"{question.text} ASSISTANT:", f" {question.answer}", kind)
        for kind, question in questions_about(rng, plot, actors)
    ]
    times = times_of(plot, actors, [sorted(paths).index(number[a.name]) for a in actors], shown)
    total = len(states) * size
    gaps = bool(rng.random() >= sampling.contiguous)
    row = video_row(features.float() + noise, blocks, keep, total, gaps)
    # the newline token tells nothing
    chosen = torch.cat([times[keep], torch.full((1, len(TIMES)), IGNORE)])
    return MovieRow(
        row.before, row.blocks, row.image, row.token_indices, row.image_size, times=chosen
    )


def times_of(
    plot: PlotName, actors: tuple[Actor, ...], columns: list[int], shown: Tensor
) -> Tensor:
    """Returns what each token tells of time, (frames S, len(TIMES)).

    Args:
        plot: as for `make_set`.
        actors: in the order in which they are seen.
        columns: of each in `shown`.
        shown: (frames, things, S), which tokens show each thing.
    """
    frames, _, size = shown.shape
    labels = torch.full((frames, size, len(TIMES)), IGNORE)
    ways = list(direction.DIRECTIONS)
    for rank, (actor, column) in enumerate(zip(actors, columns, strict=True)):
        first = actor.seen[0]
        for frame in actor.seen:
            told = {"new": int(frame == first)}
            if plot in ("appears", "order", "middle"):
                told["rank"] = rank
            elif plot == "passes":
                told["turn"] = (
                    len([f for f in actor.seen if f <= frame and f - 1 not in actor.seen]) - 1
                )
            elif plot == "direction" and frame >= 2:
                told["way"] = ways.index(direction.about_direction(actor).answer)
            for k, name in enumerate(TIMES):
                if name in told:
                    labels[frame, shown[frame, column], k] = told[name]
    return labels.flatten(0, 1)


def video_row(
    features: Tensor, blocks: list[QuestionBlock], keep: Tensor, total: int, gaps: bool
) -> Row:
    """Lays out a video as the model's prompt has it, the newline token behind it included.

    Args:
        features: of its tokens, (n, 4, width).
        blocks: the questions.
        keep: where they stand among all tokens, (n,).
        total: how many tokens the whole video has.
        gaps: whether they have the positions of the whole video.
    """
    image = torch.cat([features, features.new_zeros(1, *features.shape[1:])])
    if not gaps:
        return Row("<s>USER: ", blocks, image)
    return Row("<s>USER: ", blocks, image, torch.cat([keep, torch.tensor([total])]), total + 1)
