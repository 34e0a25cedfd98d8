"""Results of runs as rows of tables."""

from collections.abc import Mapping
from typing import Any

import msgspec

from vlm_prune.benchmarks.evaluation.records import Accuracy, Results, TokenCounts, Variant
from vlm_prune.benchmarks.stats.paired import TaskScores, difference, mcnemar
from vlm_prune.benchmarks.stats.table import as_table, percent, percent_interval, points

THREE_WAYS = "kept / per layer / paper's count"
MISSING_VALUE = "–"


def with_interval(entry: Accuracy) -> str:
    """Returns the share of the unpruned accuracy that is retained,
    with its interval, in per cent.
    """
    if entry.retained is None or entry.ci is None:
        return MISSING_VALUE
    return percent_interval(entry.retained, entry.ci)


def count(tokens: float) -> str:
    """Formats the tokens of an image, a mean where images differ."""
    return f"{tokens:.1f}".removesuffix(".0")


def three_ways(tokens: TokenCounts | Mapping[str, Any]) -> str:
    """Formats image tokens in three ways: left after the last cut, the mean that
    layers compute, and the paper's count.
    """
    if not isinstance(tokens, TokenCounts):
        tokens = msgspec.convert(tokens, TokenCounts)
    papers = MISSING_VALUE if tokens.papers is None else f"{tokens.papers:.1f}"
    return f"{count(tokens.kept)} / {tokens.layer_mean:.1f} / {papers}"


def method_name(variant: Variant, definition: str) -> str:
    """Returns the method, what it stands for if it is a name for
    another, and whether a file cuts it.
    """
    name = variant.method + (f" (= {definition})" if definition else "")
    if (density := variant.arguments.get("attention.density")) is not None:
        name = f"{name} at density {density}"
    cut_by_file = {"schedule", "inside.schedule"} & set(variant.arguments)
    return f"{name} by schedule" if cut_by_file else name


def _method_of(results: Results) -> str:
    return method_name(results.config.variant, results.definition)


def run_table(results: Results) -> Any:
    """Returns one run as a table: accuracy by task, then time, operations and memory."""
    from rich.console import Group

    title = f"{_method_of(results)}, budget {results.budget}, model {results.model}"
    rows = [["task", "n", "unpruned %", "pruned %", "% retained [95 %]", "tokens per layer"]]
    for name, task in results.tasks.items():
        rows.append([name, str(task.n), *_accuracies(task), f"{task.kept:.1f}"])
    questions = str(sum(task.n for task in results.tasks.values()))
    kept = f"{results.tokens.layer_mean:.1f}"
    rows.append(["mean", questions, *_accuracies(results.overall), kept])
    table = as_table(rows, title, sections=[len(rows) - 1])
    return Group(table, *cost_lines(results))


def _accuracies(entry: Accuracy) -> list[str]:
    return [percent(entry.baseline_accuracy), percent(entry.accuracy), with_interval(entry)]


def cost_lines(results: Results) -> list[str]:
    """Returns lines on tokens, phase times per question (median),
    operations, memory and speed-up.
    """
    tokens, time, speed = results.tokens, results.time_ms, results.speedup
    flops, kv, sparse = results.flops, results.kv_bytes, []
    if results.density is not None:
        sparse = [f"attention          {_density(results.density)} of the causal half"]
        if results.chosen_density is not None:
            sparse[0] += f", {_density(results.chosen_density)} of what methods choose"
    return [
        *sparse,
        f"tokens per image   {count(tokens.full)} -> {three_ways(tokens)} ({THREE_WAYS})",
        (
            f"ms per question    vision {time.vision:.1f}  selection {time.selection:.2f}  "
            f"prefill {time.prefill:.1f} (unpruned {time.baseline_prefill:.1f})  "
            f"decode {time.decode:.1f} (unpruned {time.baseline_decode:.1f})"
        ),
        f"first token        {first_token(results)}",
        f"vision + prefill   {flops.baseline / 1e9:.2f} -> {flops.pruned / 1e9:.2f} GFLOP",
        (
            f"KV cache           {kv.baseline / 1e6:.2f} -> {kv.pruned / 1e6:.2f} MB,  "
            f"peak memory {results.peak_memory_bytes / 1e6:.0f} MB"
        ),
        (
            f"speed-up           prefill with selection {speed.prefill:.2f}x, "
            f"end to end {speed.end_to_end:.2f}x"
        ),
    ]


def first_token(results: Results) -> str:
    """Says how long the first token takes, and the most that a cut behind the tower makes of it."""
    time = results.time_ms
    before = time.baseline_vision + time.baseline_prefill
    line = f"{before:.1f} -> {time.vision + time.selection + time.prefill:.1f} ms"
    if not time.baseline_vision:
        return line
    share = percent(time.baseline_vision / before)
    most = f"{before / time.baseline_vision:.2f}x"
    return f"{line}; the tower is {share} % of the former: a cut behind it gives {most} at most"


def comparison_table(runs: list[Results]) -> list[list[str]]:
    """Returns header and rows of several runs side by side, the unpruned model first.

    Both densities stand beside the tokens if a run has sparse attention.
    """
    first, names = runs[0], list(runs[0].tasks)
    sparse = any(run.density is not None for run in runs)
    densities = ["density", "of it chosen"] if sparse else []
    ends = ["mean", "% retained [95 %]", "prefill"]
    header = ["method", "budget", f"tokens {THREE_WAYS}", *densities, *names, *ends]
    unpruned = [percent(first.tasks[name].baseline_accuracy) for name in names]
    unpruned.append(percent(first.overall.baseline_accuracy))
    tokens, dashes = count(first.tokens.full), [MISSING_VALUE for _ in densities]
    rows = [header, ["unpruned", "", tokens, *dashes, *unpruned, "100", "1.00x"]]
    for run in runs:
        shares = [_density(run.density), _density(run.chosen_density)] if sparse else []
        accuracies = [percent(run.tasks[name].accuracy) for name in names]
        accuracies.append(percent(run.overall.accuracy))
        cells = [_method_of(run), str(run.budget), three_ways(run.tokens), *shares, *accuracies]
        rows.append([*cells, with_interval(run.overall), f"{run.speedup.prefill:.2f}x"])
    return rows


def _density(value: float | None) -> str:
    return MISSING_VALUE if value is None else f"{value:.3f}"


def overview_table(runs: list[Results]) -> list[list[str]]:
    """Returns header and rows: % of the accuracy retained [95 %] and prefill
    speed-up, methods x budgets.
    """
    methods = dict.fromkeys(run.method for run in runs)
    budgets = dict.fromkeys(str(run.budget) for run in runs)
    cells = {
        (run.method, str(run.budget)): f"{with_interval(run.overall)} at {run.speedup.prefill:.1f}x"
        for run in runs
    }
    rows = [
        [name, *(cells.get((name, budget), MISSING_VALUE) for budget in budgets)]
        for name in methods
    ]
    return [["% retained [95 %] at prefill speed-up", *budgets], *rows]


def against(name: str, runs: list[Results], scores: list[TaskScores]) -> list[list[str]]:
    """Returns a header and rows: a method's accuracy less that of the others of its budget.

    Both answered the same questions.

    Args:
        name: of the method.
        runs: of all methods.
        scores: of each run, for each task those of its questions.
    """
    rows = [["budget", f"{name} minus", "accuracy in points [95 %]", "McNemar p"]]
    by_budget = {str(run.budget): number for number, run in enumerate(runs) if run.method == name}
    for run, theirs in zip(runs, scores, strict=True):
        if run.method != name and str(run.budget) in by_budget:
            ours = scores[by_budget[str(run.budget)]]
            gain, p = points(*difference(ours, theirs)), f"{mcnemar(ours, theirs):.3f}"
            rows.append([str(run.budget), run.method, gain, p])
    return rows
