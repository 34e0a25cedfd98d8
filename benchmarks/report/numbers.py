"""What the page says in numbers: budgets, the best of each, and time by phase."""

from dataclasses import dataclass
from itertools import groupby

from vlm_prune.benchmarks.report.load import Run

CONTROLS = ("none", "random", "pool", "downsample")
PHASES = ("vision", "selection", "prefill", "decode")


@dataclass(frozen=True)
class BudgetFigures:
    """All runs of one number of tokens, and the best method and control among them."""

    tokens: int
    runs: list[Run]

    @property
    def label(self) -> str:
        """Returns the budget as it was given, with the tokens that a fraction means."""
        fraction = next((run.budget for run in self.runs if isinstance(run.budget, float)), None)
        count = f"{self.tokens} token{'s' if self.tokens > 1 else ''}"
        return count if fraction is None else f"{count} ({fraction})"

    @property
    def methods(self) -> list[Run]:
        return [run for run in self.runs if run.method not in CONTROLS]

    @property
    def best(self) -> Run:
        """Returns the most accurate method (of controls, where there
        is no other), then the faster.
        """
        return _best(self.methods or self.runs)

    @property
    def control(self) -> Run | None:
        """Returns the most accurate control that is not `best`."""
        others = [run for run in self.runs if run.method in CONTROLS and run is not self.best]
        return _best(others) if others else None


def _best(runs: list[Run]) -> Run:
    return max(runs, key=lambda r: (r.results.overall.accuracy, r.results.speedup.prefill))


def budgets(runs: list[Run]) -> list[BudgetFigures]:
    """Returns the runs in order of tokens, grouped by them."""
    return [BudgetFigures(n, list(group)) for n, group in groupby(runs, key=lambda run: run.tokens)]


@dataclass(frozen=True)
class Bar:
    """Median milliseconds per question of each phase; `run` is None for the unpruned model."""

    run: Run | None
    phases: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.phases.values())


def bars(budget: BudgetFigures) -> list[Bar]:
    """Returns time by phase at one budget: the unpruned model as measured
    beside the first run, then all.
    """
    times = budget.runs[0].results.time_ms
    unpruned = {p: getattr(times, f"baseline_{p}") for p in PHASES if p != "selection"}
    pruned = [
        Bar(run, {phase: getattr(run.results.time_ms, phase) for phase in PHASES})
        for run in budget.runs
    ]
    return [Bar(None, unpruned), *pruned]
