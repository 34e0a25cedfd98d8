"""Accuracy against computed tokens as coordinates of an SVG; the template draws them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vlm_prune.benchmarks.evaluation.tables import count
from vlm_prune.benchmarks.report.load import Run
from vlm_prune.benchmarks.report.numbers import CONTROLS

LEFT, RIGHT, TOP, BOTTOM = 40, 44, 14, 44
TICK_GAP = 40
STEPS: tuple[float, ...] = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


@dataclass(frozen=True)
class Point:
    """A run, or the unpruned model (`series` None); accuracies are fractions.

    `interval` is the paired 95 % interval of the share retained, times the unpruned accuracy; None
    where the unpruned model has no right answer.
    """

    label: str
    series: int | None
    tokens: float
    accuracy: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Mark:
    """A point in pixels; `low` and `high` are the ends of its interval."""

    point: Point
    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Plot:
    """Marks by series, the Pareto front, and ticks as (pixel, label)."""

    width: int
    height: int
    series: list[list[Mark]]
    unpruned: Mark
    front: list[Mark]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    retained_ticks: list[tuple[float, str]]

    @property
    def steps(self) -> str:
        """Returns the front as an SVG path: the accuracy that a number of tokens buys."""
        first, *rest = self.front
        path = "".join(f"H{mark.x:.1f}V{mark.y:.1f}" for mark in rest)
        return f"M{first.x:.1f} {first.y:.1f}{path}H{self.width - RIGHT}"


def series_of(runs: list[Run]) -> list[str]:
    """Returns labels of the methods, controls last; their order decides colors."""
    labels = dict.fromkeys(run.label for run in runs if run.method not in CONTROLS)
    return list(labels | dict.fromkeys(run.label for run in runs))


def plot_points(runs: list[Run]) -> list[Point]:
    """Returns one point per run, the unpruned model last."""
    base, full = runs[0].results.overall.baseline_accuracy, runs[0].results.tokens.full
    labels = series_of(runs)
    points = []
    for run in runs:
        accuracy, ends = run.results.overall.accuracy, run.results.overall.ci
        # the interval is of what is retained: times the unpruned accuracy
        interval = None if ends is None else (base * ends[0], base * ends[1])
        label = f"{run.label}, budget {run.budget}"
        series = labels.index(run.label)
        points.append(Point(label, series, run.computed, accuracy, interval))
    return [*points, Point("unpruned", None, full, base)]


def pareto(points: Sequence[Point]) -> list[Point]:
    """Returns the points that no other beats, in order of tokens; equal points stay together.

    None has fewer tokens at no less accuracy, or more accuracy at no more tokens.
    """
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.tokens, -p.accuracy)):
        # the one with most accuracy among those with fewer tokens
        best = front[-1] if front else None
        same = best and (best.tokens, best.accuracy) == (point.tokens, point.accuracy)
        if best is None or same or point.accuracy > best.accuracy:
            front.append(point)
    return front


def draw(runs: list[Run], width: int, height: int) -> Plot:
    """Lays the plot out; tokens on a logarithmic axis, methods of one budget side by side.

    Args:
        runs: what it shows.
        width: in pixels.
        height: in pixels.
    """
    points, names = plot_points(runs), series_of(runs)
    unpruned = points[-1]
    fewest = max(1.0, min(point.tokens for point in points))  # a run of text alone computes none
    span = math.log(max(unpruned.tokens / fewest, 1.01))
    ends = [y for p in points for y in (p.accuracy, *(p.interval or ()))]
    # round ends, at least a quarter of a step beyond all intervals
    step = _step(max(ends) - min(ends), height)
    bottom: float = max(0.0, math.floor(min(ends) / step - 0.25) * step)
    top: float = math.ceil(max(ends) / step + 0.25) * step
    # methods of one budget stand side by side, around its place
    dodge = min(7.0, 0.06 * width / len(names))
    inset = 16 + dodge * len(names) / 2

    def x(tokens: float) -> float:
        share = math.log(max(tokens, fewest) / fewest) / span
        return LEFT + inset + share * (width - LEFT - RIGHT - 2 * inset)

    def y(accuracy: float) -> float:
        return TOP + (top - accuracy) / (top - bottom) * (height - TOP - BOTTOM)

    def mark(point: Point) -> Mark:
        aside = 0.0 if point.series is None else point.series - (len(names) - 1) / 2
        low, high = map(y, point.interval) if point.interval else (None, None)
        return Mark(point, x(point.tokens) + dodge * aside, y(point.accuracy), low, high)

    marks = [mark(point) for point in points]
    powers = [2**n for n in range(20) if fewest <= 2**n <= unpruned.tokens]
    x_ticks = [(x(tokens), f"{tokens:g}") for tokens in powers]
    x_ticks = [tick for tick in x_ticks if tick[0] < marks[-1].x - TICK_GAP]
    retained_ticks = []
    if unpruned.accuracy > 0:
        shares = _ticks(bottom / unpruned.accuracy, top / unpruned.accuracy, height)
        retained_ticks = [(y(s * unpruned.accuracy), f"{100 * s:g}") for s in shares]
    return Plot(
        width,
        height,
        [[m for m in marks if m.point.series == number] for number in range(len(names))],
        marks[-1],
        [mark(point) for point in pareto(points)],
        [*x_ticks, (marks[-1].x, count(unpruned.tokens))],
        [(y(a), f"{round(100 * a, 1):g}") for a in _ticks(bottom, min(top, 1.0), height)],
        retained_ticks,
    )


def _step(span: float, height: int) -> float:
    """Returns the least round step that leaves ticks room."""
    room = (height - TOP - BOTTOM) / (TICK_GAP)
    return next((step for step in STEPS if span / step <= room), STEPS[-1])


def _ticks(bottom: float, top: float, height: int) -> list[float]:
    step = _step(top - bottom, height)
    first, last = math.ceil(bottom / step - 1e-9), math.floor(top / step + 1e-9)
    return [round(number * step, 6) for number in range(first, last + 1)]
