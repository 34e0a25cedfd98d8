"""Results as tables for a terminal."""

from typing import Any

from rich.console import Console, Group
from rich.table import Table

from vlm_prune.benchmarks.stats.paired import Scores, difference, mcnemar

THREE_WAYS = "kept / per layer / paper's count"


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def with_interval(entry: dict[str, Any]) -> str:
    """The share of the unpruned accuracy retained, with its interval, in per cent."""
    if entry["retained"] is None or entry["ci"] is None:
        return "–"
    low, high = entry["ci"]
    return f"{percent(entry['retained'])} [{percent(low)}, {percent(high)}]"


def count(tokens: float) -> str:
    """Tokens of an image, a mean where images differ."""
    return f"{tokens:.1f}".removesuffix(".0")


def three_ways(tokens: dict[str, Any]) -> str:
    """Image tokens left after the last cut, the mean that layers compute, and the paper's count."""
    papers = tokens.get("papers")
    counted = "–" if papers is None else f"{papers:.1f}"
    return f"{count(tokens['kept'])} / {tokens['layer_mean']:.1f} / {counted}"


def method_name(results: dict[str, Any]) -> str:
    """The method, what it stands for if it is a name for another, and whether a file cuts it."""
    name, definition = str(results["method"]), results.get("definition")
    if definition:
        name += f" (= {definition})"
    arguments = results["config"]["variant"]["arguments"]
    return f"{name} by schedule" if {"schedule", "inside.schedule"} & set(arguments) else name


def run_table(results: dict[str, Any]) -> Group:
    """One run: accuracy by task, then time, operations and memory."""
    title = f"{method_name(results)}, budget {results['budget']}, model {results['model']}"
    columns = ("task", "n", "unpruned %", "pruned %", "% retained [95 %]", "tokens per layer")
    table = Table(*columns, title=title)
    for name, task in results["tasks"].items():
        accuracies = (percent(task[key]) for key in ("baseline_accuracy", "accuracy"))
        table.add_row(name, str(task["n"]), *accuracies, with_interval(task), f"{task['kept']:.1f}")
    overall = results["overall"]
    asked = str(sum(task["n"] for task in results["tasks"].values()))
    accuracies = (percent(overall[key]) for key in ("baseline_accuracy", "accuracy"))
    table.add_section()
    kept = f"{results['tokens']['layer_mean']:.1f}"
    table.add_row("mean", asked, *accuracies, with_interval(overall), kept)
    return Group(table, *cost_lines(results))


def cost_lines(results: dict[str, Any]) -> list[str]:
    """Tokens, phase times per question (median), operations, memory and speed-up."""
    tokens, time, speed = results["tokens"], results["time_ms"], results["speedup"]
    flops, kv = results["flops"], results["kv_bytes"]
    return [
        f"tokens per image   {count(tokens['full'])} -> {three_ways(tokens)} ({THREE_WAYS})",
        (
            f"ms per question    vision {time['vision']:.1f}  selection {time['selection']:.2f}  "
            f"prefill {time['prefill']:.1f} (unpruned {time['baseline_prefill']:.1f})  "
            f"decode {time['decode']:.1f} (unpruned {time['baseline_decode']:.1f})"
        ),
        f"vision + prefill   {flops['baseline'] / 1e9:.2f} -> {flops['pruned'] / 1e9:.2f} GFLOP",
        (
            f"KV cache           {kv['baseline'] / 1e6:.2f} -> {kv['pruned'] / 1e6:.2f} MB,  "
            f"peak memory {results['peak_memory_bytes'] / 1e6:.0f} MB"
        ),
        (
            f"speed-up           prefill with selection {speed['prefill']:.2f}x, "
            f"end to end {speed['end_to_end']:.2f}x"
        ),
    ]


def comparison(runs: list[dict[str, Any]]) -> list[list[str]]:
    """Header and rows of several runs side by side, the unpruned model first."""
    first, names = runs[0], list(runs[0]["tasks"])
    header = [
        "method",
        "budget",
        f"tokens {THREE_WAYS}",
        *names,
        "mean",
        "% retained [95 %]",
        "prefill",
    ]
    unpruned = [percent(first["tasks"][name]["baseline_accuracy"]) for name in names]
    unpruned.append(percent(first["overall"]["baseline_accuracy"]))
    rows = [header, ["unpruned", "", count(first["tokens"]["full"]), *unpruned, "100", "1.00x"]]
    for run in runs:
        accuracies = [percent(run["tasks"][name]["accuracy"]) for name in names]
        accuracies.append(percent(run["overall"]["accuracy"]))
        tokens, speed = three_ways(run["tokens"]), f"{run['speedup']['prefill']:.2f}x"
        retained = with_interval(run["overall"])
        rows.append([method_name(run), str(run["budget"]), tokens, *accuracies, retained, speed])
    return rows


def overview(runs: list[dict[str, Any]]) -> list[list[str]]:
    """Header and rows: % of the accuracy retained [95 %] and prefill speed-up, methods x budgets."""
    methods, budgets = ({str(run[key]): None for run in runs} for key in ("method", "budget"))
    cells = {
        (run["method"], str(run["budget"])): (
            f"{with_interval(run['overall'])} at {run['speedup']['prefill']:.1f}x"
        )
        for run in runs
    }
    rows = [[name, *(cells.get((name, budget), "–") for budget in budgets)] for name in methods]
    return [["% retained [95 %] at prefill speed-up", *budgets], *rows]


def as_gain(point: float, interval: list[float]) -> str:
    """A difference of accuracies in points, with its interval."""
    return f"{100 * point:+.1f} [{100 * interval[0]:+.1f}, {100 * interval[1]:+.1f}]"


def against(name: str, runs: list[dict[str, Any]], scores: list[Scores]) -> list[list[str]]:
    """Header and rows: method `name` less every other one of its budget, on the same questions."""
    rows = [["budget", f"{name} minus", "accuracy in points [95 %]", "McNemar p"]]
    own = {run["budget"]: number for number, run in enumerate(runs) if run["method"] == name}
    for run, theirs in zip(runs, scores, strict=True):
        if run["method"] != name and run["budget"] in own:
            ours = scores[own[run["budget"]]]
            gain, p = as_gain(*difference(ours, theirs)), f"{mcnemar(ours, theirs):.3f}"
            rows.append([str(run["budget"]), run["method"], gain, p])
    return rows


def as_table(lines: list[list[str]]) -> Table:
    """A header and rows, for a terminal."""
    header, *rows = lines
    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    return table


def as_markdown(lines: list[list[str]]) -> str:
    """A header and rows, in Markdown."""
    header, *rows = lines
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def show(item: Any) -> None:
    """Print without cutting columns, also where there is no terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(item)
