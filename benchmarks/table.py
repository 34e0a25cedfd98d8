"""Results as tables for a terminal."""

from typing import Any

from rich.console import Console, Group
from rich.table import Table


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def with_interval(entry: dict[str, Any]) -> str:
    low, high = entry["ci"]
    return f"{percent(entry['retained'])} [{percent(low)}, {percent(high)}]"


def run_table(results: dict[str, Any]) -> Group:
    """One run: accuracy by task, then time, operations and memory."""
    title = f"{results['method']}, budget {results['budget']}, model {results['model']}"
    table = Table("task", "n", "unpruned %", "pruned %", "% retained [95 %]", title=title)
    for name, task in results["tasks"].items():
        accuracies = (percent(task[key]) for key in ("baseline_accuracy", "accuracy"))
        table.add_row(name, str(task["n"]), *accuracies, with_interval(task))
    overall = results["overall"]
    count = str(sum(task["n"] for task in results["tasks"].values()))
    accuracies = (percent(overall[key]) for key in ("baseline_accuracy", "accuracy"))
    table.add_section()
    table.add_row("mean", count, *accuracies, with_interval(overall))
    return Group(table, *cost_lines(results))


def cost_lines(results: dict[str, Any]) -> list[str]:
    """Tokens, phase times per question (median), operations, memory and speed-up."""
    tokens, time, speed = results["tokens"], results["time_ms"], results["speedup"]
    flops, kv = results["flops"], results["kv_bytes"]
    return [
        (
            f"tokens per image   {tokens['full']} -> {tokens['kept']:.0f} kept, "
            f"{tokens['layer_mean']:.1f} per layer"
        ),
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


def compare_table(runs: list[dict[str, Any]]) -> Table:
    """Several runs, one row each."""
    names = list(runs[0]["tasks"])
    table = Table(
        "method", "budget", "tokens/layer", *names, "mean", "% retained [95 %]", "prefill"
    )
    first = runs[0]
    table.add_row(
        "unpruned", "", str(first["tokens"]["full"]),
        *(percent(first["tasks"][name]["baseline_accuracy"]) for name in names),
        percent(first["overall"]["baseline_accuracy"]), "100", "1.00x",
    )  # fmt: skip
    for run in runs:
        table.add_row(
            run["method"], str(run["budget"]), f"{run['tokens']['layer_mean']:.1f}",
            *(percent(run["tasks"][name]["accuracy"]) for name in names),
            percent(run["overall"]["accuracy"]), with_interval(run["overall"]),
            f"{run['speedup']['prefill']:.2f}x",
        )  # fmt: skip
    return table


def show(item: Any) -> None:
    """Print without cutting columns, also where there is no terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(item)
