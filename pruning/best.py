"""The combination that won the search on validation questions, by budget."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import log
from pathlib import Path
from typing import Annotated, Any, ClassVar

import msgspec

from vlm_prune.pruning.base import PositionRule, Pruner, Stage
from vlm_prune.pruning.registry import build, check_own
from vlm_prune.vlm.budget import per_frame, tokens_for
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.records import read_record
from vlm_prune.vlm.encoded import Images
from vlm_prune.vlm.families import Family, Need
from vlm_prune.vlm.prompt_pruning import Positions
from vlm_prune.vlm.trace import Trace

REMEDY = "give the best.json of vlm-prune search"
PACKAGED = {name: Path(__file__).with_name(f"best_{name}.json") for name in ("tiny", "smol")}
"""The package's files, by the embedded model on which each was found."""


@dataclass
class Best(Pruner):
    """The method that `vlm-prune search` chose for the budget nearest to this one, a share of the
    tokens among shares and a number among numbers; where `positions` is `auto` they are those that
    the search chose, or that method's.

    Args:
        definitions: file that the search wrote, or the embedded model on which the package's own was
            found; unless given, the one whose number of decoder layers is nearest, as a ratio, to the
            model's.
    """

    definitions: str = ""
    stage: ClassVar[Stage] = "decoder"
    authors_positions: ClassVar[PositionRule] = "as its parts"

    def _found(self) -> "list[Definitions]":
        """Returns the given definitions, or all of the package."""
        if self.definitions:
            return [definitions(str(PACKAGED.get(self.definitions, self.definitions)))]
        return list(packaged_definitions().values())

    def _nearest(self, layers: int) -> "Definitions":
        """Returns the definitions for a model of so many decoder layers."""
        return min(self._found(), key=lambda found: abs(log(layers / found.layers)))

    def _entry(self, layers: int) -> "Entry":
        found, each = self._nearest(layers), per_frame(self.budget)
        budget = each if each is not None else self.budget
        wanted = float(budget)
        if isinstance(budget, int) and found.tokens is None:
            raise InputError(
                f"{self.definitions} was found on images of any size, for shares of their tokens; "
                f"give a share such as 0.11 instead of {self.budget}"
            )
        if isinstance(budget, float) and found.tokens is not None:
            wanted *= found.tokens
        near = min(found.entries, key=lambda budget: abs(log(wanted / float(budget))))
        return found.entries[near]

    def chosen(self, tokens: int | None, layers: int) -> Pruner:
        """Returns the method that it stands for on images of `tokens` tokens and a model of `layers`
        decoder layers; None asks for images that differ in size.
        """
        entry = self._entry(layers)
        budget = self.budget if tokens is None else tokens_for(self.budget, tokens)
        positions = entry.positions if self.positions == "auto" else self.positions
        built: Pruner = build(
            entry.method, budget=budget, positions=positions, seed=self.seed, **entry.arguments
        )
        return built

    def resolved(self, family: Family) -> Pruner:
        tokens = family.tokens_per_image if family.fixed_size else None
        return self.chosen(tokens, len(family.decoder.layers))

    @property
    def needs(self) -> frozenset[Need]:
        """Returns what a model must have for all methods that it may stand for, whatever its depth."""
        return frozenset[Need]().union(*(found.needs for found in self._found()))

    def needs_on(self, layers: int) -> frozenset[Need]:
        return self._nearest(layers).needs

    def definition(self, layers: int) -> str:
        return self._entry(layers).command

    def papers_count(self, tokens: int, layer_tokens: list[float]) -> float | None:
        return self.chosen(tokens, len(layer_tokens)).papers_count(tokens, layer_tokens)

    def check(self, tokens: int, layers: int) -> None:
        super().check(tokens, layers)
        self.chosen(tokens, layers).check(tokens, layers)

    def __call__(
        self, model: Any, vision: Images | None = None, video_frames: Sequence[int] | None = None
    ) -> AbstractContextManager[Trace]:
        return self.resolved(self.admit(model))(model, vision, video_frames)


class Entry(msgspec.Struct, frozen=True):
    """The method of a budget; what else a search notes about it is evidence."""

    method: str
    arguments: dict[str, bool | int | float | str | None]
    positions: Positions = "auto"

    @property
    def command(self) -> str:
        """Returns the method with its hyperparameters and positions, as on the command line."""
        return command_of(self.method, self.arguments, self.positions)


@dataclass(frozen=True)
class Definitions:
    """What a search found.

    Args:
        layers: of the decoder of the model searched.
        tokens: of an image in the search; None where they differed in size.
        entries: of each budget, which is a number of tokens, or a share of them where images differed
            in size.
    """

    layers: int
    tokens: int | None
    entries: dict[str, Entry]

    @cached_property
    def needs(self) -> frozenset[Need]:
        """Returns what a model must have for all of them."""
        parts = (build(entry.method, **entry.arguments).needs for entry in self.entries.values())
        return frozenset[Need]().union(*parts)


def command_of(name: str, arguments: dict[str, Any], positions: str) -> str:
    """Returns how a method is given on the command line.

    Args:
        name: of the method.
        arguments: its hyperparameters.
        positions: of kept tokens; `auto` is not said.
    """
    chosen = arguments if positions == "auto" else arguments | {"positions": positions}
    return ", ".join([name, *(f"{key}={value}" for key, value in chosen.items())])


def definitions(path: str) -> Definitions:
    """Returns what a file defines; it is read once, and again when it has changed.

    Raises:
        InputError: if the file is no definition of a search.
    """
    try:
        status = Path(path).stat()
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', error)}") from None
    return _definitions(path, status.st_mtime_ns, status.st_size)


def packaged_definitions() -> dict[str, Definitions]:
    """Returns the package's definitions, by the embedded model on which they were found."""
    return {name: definitions(str(path)) for name, path in PACKAGED.items() if path.exists()}


class _File(msgspec.Struct, frozen=True):
    """What is read of the file that a search writes."""

    layers: Annotated[int, msgspec.Meta(ge=1)]
    tokens: Annotated[int, msgspec.Meta(ge=1)] | None
    budgets: Annotated[dict[float, Entry], msgspec.Meta(min_length=1)]


@lru_cache
def _definitions(path: str, _time: int, _size: int) -> Definitions:
    """Reads a file of definitions, again where its time or size has changed.

    Args:
        path: of the file.
        _time: of its last change.
        _size: in bytes.

    Raises:
        InputError: if it is damaged, or a definition cannot be built.
    """
    found = read_record(Path(path), _File, REMEDY)
    for budget in found.budgets:
        fits = 0 < budget <= 1 if found.tokens is None else budget >= 1 and budget.is_integer()
        if not fits:
            kind = "a share" if found.tokens is None else "a number of tokens"
            raise InputError(f"{path}: budget {budget:g} is not {kind}; {REMEDY}")
    entries = {f"{budget:g}": entry for budget, entry in found.budgets.items()}
    for entry in entries.values():
        if "best" in entry.method.split("+"):
            raise InputError(f"{path} defines best by itself; give the best.json of a search")
        try:
            check_own(entry.arguments)
            build(entry.method, **entry.arguments)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
    return Definitions(found.layers, found.tokens, entries)
