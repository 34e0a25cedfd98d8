"""The combination that won the search on validation questions, by budget."""

import json
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any, ClassVar

from vlm_prune.pruning.base import Pruner, Stage
from vlm_prune.pruning.registry import build
from vlm_prune.vlm.budget import tokens_for
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.encoded import Images
from vlm_prune.vlm.families import Need, family_of
from vlm_prune.vlm.trace import Trace

PACKAGED = Path(__file__).with_name("best.json")


@dataclass
class Best(Pruner):
    """The method that `vlm-prune search` chose for the budget nearest to this one.

    Args:
        definitions: file that the search wrote; the package's own unless given, which was found on
            the embedded model.
    """

    definitions: str = str(PACKAGED)
    stage: ClassVar[Stage] = "decoder"

    def _entry(self, tokens: int) -> tuple[str, dict[str, Any]]:
        whole, entries = definitions(self.definitions)
        share = tokens_for(self.budget, tokens) / tokens
        near = min(entries, key=lambda budget: abs(log(share * whole / int(budget))))
        return entries[near]

    def chosen(self, tokens: int) -> Pruner:
        """The method itself, for images of so many tokens."""
        name, arguments = self._entry(tokens)
        built: Pruner = build(
            name, budget=tokens_for(self.budget, tokens), positions=self.positions, seed=self.seed,
            **arguments,
        )  # fmt: skip
        return built

    @property
    def needs(self) -> frozenset[Need]:
        """Those of what it may stand for; and budgets mean something else where sizes differ."""
        entries = definitions(self.definitions)[1].values()
        parts = (build(name, **more).needs for name, more in entries)
        return frozenset[Need]({"a fixed image size"}).union(*parts)

    def definition(self, tokens: int) -> str:
        return described(*self._entry(tokens))

    def papers_count(self, tokens: int, layer_tokens: list[float]) -> float | None:
        return self.chosen(tokens).papers_count(tokens, layer_tokens)

    def check(self, tokens: int, layers: int) -> None:
        self.chosen(tokens).check(tokens, layers)

    def __call__(self, model: Any, vision: Images | None = None) -> AbstractContextManager[Trace]:
        return self.chosen(family_of(model).tokens_per_image)(model, vision)


def described(name: str, arguments: dict[str, Any]) -> str:
    """A method and its hyperparameters, as on the command line."""
    return ", ".join([name, *(f"{key}={value}" for key, value in arguments.items())])


def definitions(path: str) -> tuple[int, dict[str, tuple[str, dict[str, Any]]]]:
    """Tokens of an image in the search, and for each budget a method and its hyperparameters.

    Raises:
        InputError: if the file is no definition of a search.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        entries = {
            str(int(budget)): (str(entry["method"]), dict(entry["arguments"]))
            for budget, entry in content["budgets"].items()
        }
        if not entries:
            raise ValueError("no budget")
        return int(content["tokens"]), entries
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} defines no method ({type(error).__name__}: {error}); "
            "give the best.json of vlm-prune search"
        ) from error
