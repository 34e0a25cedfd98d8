"""Search the combination of methods that answers best at a budget, on validation questions alone.

Candidates meet in rounds on more and more questions, each round keeping the better third. The best
of them are then varied one hyperparameter at a time. Because the winner was chosen among many, its
score on those questions flatters it: it is compared with the single methods on new ones.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_prune.benchmarks.evaluation.engine import evaluate
from vlm_prune.benchmarks.evaluation.environment import command_line, versions
from vlm_prune.benchmarks.evaluation.records import (
    Argument,
    Interval,
    PairedRow,
    Record,
    RunConfig,
    Share,
    Tokens,
    Variant,
)
from vlm_prune.benchmarks.evaluation.store import GroupFolder, RunFolder
from vlm_prune.benchmarks.evaluation.tables import THREE_WAYS, three_ways
from vlm_prune.benchmarks.stats.paired import difference, mcnemar
from vlm_prune.benchmarks.stats.table import as_markdown, percent, points
from vlm_prune.pruning import DecoderPruner, VisionPruner
from vlm_prune.pruning.base import PositionRule
from vlm_prune.pruning.best import command_of
from vlm_prune.pruning.registry import methods
from vlm_prune.vlm.common.files import write_text
from vlm_prune.vlm.common.records import to_json
from vlm_prune.vlm.families import family_of
from vlm_prune.vlm.prompt_pruning import Positions

FILES = ("search.md", "best.json")
WIDENINGS = (1.5, 2.0, 3.0, 4.0)
MERGED = {"merge", "visionzip", "apet"}
# zoo chooses as zoo-exact does
NO_PART = {"none", "random", "pool", "downsample", "merge", "restore", "dedupe", "icr", "zoo"}
COMBINED = {"cascade", "merge", "restore", "dedupe", "icr", "best"}
VARIATIONS: dict[str, dict[str, tuple[Any, ...]]] = {
    "fopru": {"queries": ("all", "cls")},
    "visionzip": {"contextual": (0.05, 0.15625, 0.3)},
    "vispruner": {"important": (0.25, 0.5, 0.75)},
    "cdpruner": {"negated": (False, True)},
    "fastv": {"layer": (1, 2, 4), "queries": ("all", "last")},
    "sparsevlm": {"recycle": (0.0, 0.3)},
    "pyramiddrop": {"ratio": (0.35, 0.5, 0.7)},
    "dart": {"layer": (0, 2, 4), "image_pivots": (2, 4, 8)},
}
FINALISTS = 3


@dataclass(frozen=True)
class Round:
    """What one round measured: accuracy by task of each variant, and image tokens in three ways."""

    scores: list[dict[str, NDArray[np.float64]]]
    tokens: list[Tokens]

    def accuracy(self, number: int) -> float:
        """Returns the mean over tasks, rounded so that equal ones are equal."""
        return round(float(np.mean([v.mean() for v in self.scores[number].values()])), 9)


class ComparedMethod(Record, frozen=True):
    """A single method beside the combination: `difference` is the combination's accuracy less its
    own, with a paired interval, and `p` that of McNemar's test.
    """

    method: str
    accuracy: Share
    tokens: Tokens
    difference: float
    ci: Interval
    p: Share


class Definition(Record, frozen=True):
    """What `best` stands for at a budget, and the comparison that it stands on.

    Args:
        method: the most accurate of all.
        wins: whether the combination is above every single method beyond the interval.
        combination: the best one, as on the command line.
        tokens: of the combination.
    """

    method: str
    arguments: dict[str, Argument]
    positions: str
    accuracy: Share
    wins: bool
    combination: str
    combination_accuracy: Share
    tokens: Tokens
    against: list[ComparedMethod]


class SearchResults(Record, frozen=True):
    """`best.json`: definitions by budget, found on a model of so many decoder `layers` with images of
    so many `tokens`; None where they differ in size, and budgets are shares.
    """

    model: str
    layers: int
    tokens: int | None
    questions: int
    seed: int
    versions: dict[str, str]
    command: str
    budgets: dict[str, Definition]


def image_methods() -> dict[str, Any]:
    """Returns registered methods that choose among an image's tokens;
    others compare a video's frames.
    """
    return {name: m for name, m in methods().items() if "videos" not in m().needs}


def singles() -> list[str]:
    """Returns registered methods that are no combination of others, controls included."""
    return [name for name in image_methods() if name not in COMBINED | {"none"}]


def parts() -> tuple[list[str], ...]:
    """Returns the methods of which combinations are made: before the language model, and inside it."""
    table = image_methods()
    before = [n for n, m in table.items() if issubclass(m, VisionPruner) and n not in NO_PART]
    return before, [n for n, m in table.items() if issubclass(m, DecoderPruner)]


def combinations(budget: float, before: Sequence[str], inside: Sequence[str]) -> list[Variant]:
    """Returns every method before the language model with every one inside it, merging or not.

    Methods before it also come alone, with other positions than the authors'.

    Args:
        budget: of each.
        before: methods before the language model.
        inside: methods inside it.
    """
    table = image_methods()
    first = [*before, *(f"{name}+merge" for name in before if name not in MERGED)]
    found = [Variant(name, budget) for name in first if "+" in name]
    found += [
        Variant(name, budget, positions)
        for name in before
        for positions in other_positions(table[name]().authors_positions)
    ]
    found += [
        Variant(f"{name}+{second}", budget, arguments={"widening": widening})
        for name in first
        for second in inside
        for widening in WIDENINGS
    ]
    return found


def other_positions(authors: PositionRule) -> tuple[Positions, ...]:
    """Returns what positions may be instead of the authors'; parts that differ may all have either."""
    both: tuple[Positions, ...] = ("contiguous", "original")
    return tuple(positions for positions in both if positions != authors)


def variations(variant: Variant) -> list[Variant]:
    """Returns the variant with one hyperparameter of one part, or its
    positions, changed at a time.
    """
    parts = variant.method.split("+")
    inside = parts[-1] if parts[-1] in VARIATIONS and "widening" in variant.arguments else ""
    merged = "merge" in parts
    outer = "pre." if "widening" in variant.arguments else ""
    prefixes = {parts[0]: f"{outer}method." if merged else outer, inside: "inside."}
    found = [
        replace(variant, arguments=variant.arguments | {f"{prefix}{name}": value})
        for part, prefix in prefixes.items()
        for name, values in VARIATIONS.get(part, {}).items()
        for value in values
        if value != values_of(part)[name]
    ]
    if variant.positions == "auto":
        others = other_positions(variant.build(0).authors_positions)
        found += [replace(variant, positions=positions) for positions in others]
    return found


def values_of(method: str) -> dict[str, Any]:
    """Returns a method's own hyperparameters."""
    return dict(vars(methods()[method]()))


@dataclass
class Search:
    """The rounds of one search.

    Args:
        common: model, tasks, seed and the like of every run.
        limit: questions of the last round, and of the comparison.
        output: folder of the runs; a killed search resumes there.
        watch: makes what to call with the number of questions done, for a round of so many.
        group: the folder of the runs while it is searched.
        most_parts: how many methods before the language model, and inside it, are combined, those
            that answer best alone; all unless given.
    """

    model: Any
    processor: Any
    common: RunConfig
    limit: int
    output: Path
    watch: Callable[[str, int], Any]
    group: GroupFolder | None = None
    most_parts: int | None = None

    def measure(self, name: str, variants: list[Variant], limit: int, seed: int) -> Round:
        """Runs all variants on the same validation questions.

        Args:
            name: of the round and its folder.
            variants: what is compared.
            limit: questions in all.
            seed: of the questions.
        """
        config = replace(self.common, split="val", limit=limit, seed=seed)
        with ExitStack() as stack:
            folders = [
                stack.enter_context(
                    RunFolder(
                        self.output / name / _folder(variant),
                        replace(config, variant=variant),
                        PairedRow,
                        group=self.group,
                    )
                )
                for variant in variants
            ]
            advance = stack.enter_context(self.watch(name, limit))
            results = evaluate(self.model, self.processor, folders, advance)
        return Round([folder.scores() for folder in folders], [run.tokens for run in results])

    def works(self, variant: Variant) -> bool:
        """Returns whether the model has what the variant needs, and a choice of
        positions where it makes one.
        """
        family = family_of(self.model)
        if variant.positions != "auto" and family.mrope:
            return False
        return not variant.build(self.common.seed).needs & family.lacks

    def best_by_budget(self, budgets: Sequence[int | float]) -> dict[int | float, Variant]:
        """Returns the best combination at each budget."""
        seed, least = self.common.seed, len(self.common.tasks)
        chosen = self._parts(budgets)
        left: dict[int | float, list[Variant]] = {
            budget: [
                variant for variant in combinations(budget, *chosen[budget]) if self.works(variant)
            ]
            for budget in budgets
        }
        for number, limit in enumerate((self.limit // 9, self.limit // 3, self.limit), 1):
            candidates = [variant for variants in left.values() for variant in variants]
            measured = self.measure(f"round-{number}", candidates, max(least, limit), seed)
            keep = FINALISTS if limit == self.limit else None
            left = {b: _best(candidates, measured, b, keep) for b in budgets}
        finalists = [variant for variants in left.values() for variant in variants]
        varied = (new for old in finalists for new in variations(old))
        candidates = [*finalists, *filter(self.works, varied)]
        measured = self.measure("varied", candidates, self.limit, seed)
        return {budget: _best(candidates, measured, budget, 1)[0] for budget in budgets}

    def _parts(self, budgets: Sequence[int | float]) -> dict[int | float, tuple[list[str], ...]]:
        """Returns the methods to combine at each budget, before the language model and inside it."""
        if self.most_parts is None:
            return dict.fromkeys(budgets, parts())
        kinds = [[n for n in kind if self.works(Variant(n, budgets[0]))] for kind in parts()]
        candidates = [Variant(name, b) for b in budgets for kind in kinds for name in kind]
        limit = max(len(self.common.tasks), self.limit // 3)
        measured = self.measure("parts", candidates, limit, self.common.seed)
        ranked = {
            b: [v.method for v in _best(candidates, measured, b, len(candidates))] for b in budgets
        }
        return {
            b: tuple([n for n in names if n in kind][: self.most_parts] for kind in kinds)
            for b, names in ranked.items()
        }

    def run(self, budgets: Sequence[int | float]) -> SearchResults:
        """Returns the definitions that `Best` reads, with the comparison that they stand on."""
        with GroupFolder(self.output, "search") as self.group:
            return self._run(budgets)

    def _run(self, budgets: Sequence[int | float]) -> SearchResults:
        chosen, family = self.best_by_budget(budgets), family_of(self.model)
        plain = [name for name in singles() if self.works(Variant(name, budgets[0]))]
        candidates = [
            v for b in budgets for v in (chosen[b], *(Variant(name, b) for name in plain))
        ]
        measured = self.measure("compared", candidates, self.limit, self.common.seed + 1)
        step = 1 + len(plain)
        return SearchResults(
            model=self.common.model,
            layers=len(family.decoder.layers),
            tokens=family.tokens_per_image if family.fixed_size else None,
            questions=self.limit,
            seed=self.common.seed,
            versions=versions(),
            command=command_line(),
            budgets={
                str(budget): _compared(candidates, measured, number * step, step)
                for number, budget in enumerate(budgets)
            },
        )


def _folder(variant: Variant) -> str:
    named = "".join(f"-{key}={value}" for key, value in variant.with_positions.items())
    return f"{variant.method}-{variant.budget}{named}"


def _best(
    candidates: list[Variant], measured: Round, budget: float, keep: int | None
) -> list[Variant]:
    """Returns the most accurate variants of a budget, a third of them
    unless told; ties in given order.

    Args:
        candidates: variants of all budgets.
        measured: their scores.
        budget: of those that are returned.
        keep: how many; a third, at least `FINALISTS`, unless given.
    """
    at_budget = [n for n, variant in enumerate(candidates) if variant.budget == budget]
    at_budget.sort(key=lambda n: -measured.accuracy(n))
    return [candidates[n] for n in at_budget[: keep or max(FINALISTS, -(-len(at_budget) // 3))]]


def _compared(candidates: list[Variant], measured: Round, first: int, count: int) -> Definition:
    """Compares the combination at `first` with the single methods behind
    it; the better one is named.

    Args:
        candidates: variants.
        measured: their scores.
        first: index of the combination.
        count: it and the methods behind it.
    """
    against, ours = [], candidates[first]
    for number in range(first + 1, first + count):
        point, interval = difference(measured.scores[first], measured.scores[number])
        against.append(
            ComparedMethod(
                method=candidates[number].method,
                accuracy=measured.accuracy(number),
                tokens=measured.tokens[number],
                difference=point,
                ci=interval,
                p=mcnemar(measured.scores[first], measured.scores[number]),
            )
        )
    top = max(range(first, first + count), key=lambda n: measured.accuracy(n))
    return Definition(
        method=candidates[top].method,
        arguments=candidates[top].arguments,
        positions=candidates[top].positions,
        accuracy=measured.accuracy(top),
        wins=all(rival.ci[0] > 0 for rival in against),
        combination=command_of(ours.method, ours.arguments, ours.positions),
        combination_accuracy=measured.accuracy(first),
        tokens=measured.tokens[first],
        against=against,
    )


def definition_table(entry: Definition) -> list[list[str]]:
    """Returns header and one row per single method: its accuracy and how
    far the combination is above.
    """
    rows = [["method", f"tokens {THREE_WAYS}", "accuracy %", "combination minus it [95 %]", "p"]]
    combined = percent(entry.combination_accuracy)
    rows.append([entry.combination, three_ways(entry.tokens), combined, "", ""])
    for rival in sorted(entry.against, key=lambda rival: -rival.accuracy):
        accuracy, tokens = percent(rival.accuracy), three_ways(rival.tokens)
        gain = points(rival.difference, rival.ci)
        rows.append([rival.method, tokens, accuracy, gain, f"{rival.p:.3f}"])
    return rows


def search_verdict(budget: str, entry: Definition) -> str:
    """Says in one line whether the combination beats every single method."""
    if entry.wins:
        return f"budget {budget}: {entry.combination} beats every single method"
    equal = [rival.method for rival in entry.against if rival.ci[0] <= 0]
    name = command_of(entry.method, entry.arguments, entry.positions)
    return (
        f"budget {budget}: no combination beats every single method; {entry.combination} is not "
        f"above {', '.join(equal)} beyond the interval; the most accurate is {name}"
    )


def save_search(results: SearchResults, output: Path, definitions: Path) -> None:
    """Writes `search.md`, and the definitions into the same folder and to where `Best` reads them.

    Args:
        results: of the search.
        output: folder of the search.
        definitions: file that `Best` reads.
    """
    parts = [
        f"{search_verdict(budget, entry)}\n\n{as_markdown(definition_table(entry))}"
        for budget, entry in results.budgets.items()
    ]
    write_text(output / FILES[0], "\n".join(parts))
    for path in (output / FILES[1], definitions):
        write_text(path, to_json(results))
