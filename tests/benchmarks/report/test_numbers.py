"""The Pareto front, the plot's geometry, the best of a budget, and which questions are shown."""

import random

import pytest

from vlm_prune.benchmarks.report.gallery import chosen
from vlm_prune.benchmarks.report.load import load_runs
from vlm_prune.benchmarks.report.numbers import bars, budgets
from vlm_prune.benchmarks.report.plot import LEFT, RIGHT, Point, draw, pareto


def point(tokens, accuracy):
    return Point("", 0, tokens, accuracy)


def test_front_is_what_no_other_point_beats():
    rng = random.Random(0)
    points = [point(n, rng.randrange(n) / 8) for n in rng.choices(range(1, 9), k=60)]
    beaten = {
        a
        for a in points
        for b in points
        if b.tokens <= a.tokens and b.accuracy >= a.accuracy
        if (b.tokens, b.accuracy) != (a.tokens, a.accuracy)
    }
    front = pareto(points)
    assert set(front) == set(points) - beaten and 1 < len(front) < len(points)
    assert [p.tokens for p in front] == sorted(p.tokens for p in front)


def test_equal_points_are_both_on_the_front():
    assert pareto([point(64, 0.5), point(128, 0.5), point(64, 0.5)]) == [point(64, 0.5)] * 2


@pytest.mark.parametrize("width", [860, 360])
def test_plot_keeps_order_and_stays_inside(make_run, edit, tmp_path, width):
    for number, (method, budget) in enumerate([("fopru", 64), ("fopru", 128), ("random", 64)]):
        folder = make_run(tmp_path / str(number), method, budget)
        accuracy = (4 + number) / 10

        def change(results, accuracy=accuracy):
            results["overall"] |= {"accuracy": accuracy, "ci": [accuracy - 0.1, accuracy + 0.2]}

        edit(folder / "results.json", change)
    plot = draw(load_runs([tmp_path]), width, 400)
    (few, many), (control,) = plot.series
    assert LEFT < few.x < control.x < many.x < plot.unpruned.x < width - RIGHT
    for mark in (few, many, control):
        assert 0 < mark.high < mark.y < mark.low < 400
    assert plot.unpruned.y < control.y < many.y < few.y
    assert [mark.point.accuracy for mark in plot.front] == [0.6, 1.0]
    for ticks in (plot.x_ticks, plot.y_ticks, plot.retained_ticks):
        assert len(ticks) > 2


def test_a_model_without_right_answers_has_no_intervals(make_run, edit, tmp_path):
    none = {"accuracy": 0.0, "baseline_accuracy": 0.0, "retained": None, "ci": None}
    edit(make_run(tmp_path) / "results.json", lambda results: results["overall"].update(none))
    plot = draw(load_runs([tmp_path]), 860, 400)
    assert plot.series[0][0].low is None and plot.retained_ticks == []


def test_best_of_a_budget_is_named_next_to_the_best_control(make_run, edit, tmp_path):
    scores = {"fopru": 0.5, "zoo": 0.6, "random": 0.9, "pool": 0.8}
    for method, accuracy in scores.items():
        folder = make_run(tmp_path / method, method)

        def change(results, accuracy=accuracy):
            results["overall"]["accuracy"] = accuracy

        edit(folder / "results.json", change)
    make_run(tmp_path / "control", "random", 32)
    fewer, group = budgets(load_runs([tmp_path]))
    assert (group.best.method, group.control.method) == ("zoo", "random")
    assert (fewer.best.method, fewer.control) == ("random", None)
    unpruned, *pruned = bars(group)
    assert unpruned.total == 6 and [bar.total for bar in pruned] == [8] * 4


def test_changed_answers_are_shown_first_and_tasks_take_turns(make_run, tmp_path):
    runs = load_runs([make_run(tmp_path, per_task=4, tasks=("exist", "text", "ocr"))])
    assert chosen(runs, 5) == [
        "exist/000001", "ocr/000001", "exist/000003", "ocr/000003", "exist/000000",
    ]  # fmt: skip
