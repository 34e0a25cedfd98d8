"""Which method works on which model family, from what the one needs and the other lacks."""

import sys
from collections.abc import Callable
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from vlm_prune.benchmarks.stats.table import as_markdown
from vlm_prune.pruning.registry import methods
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.families import FAMILIES
from vlm_prune.vlm.serving.embeds import check_sendable
from vlm_prune.vlm.serving.plugin import CLASSES
from vlm_prune.vlm.serving.settings import Settings, check_lacks


def support() -> dict[str, dict[str, bool]]:
    """Returns for every method and family whether it works; where not,
    the method says so in one line.
    """
    return {
        name: {family: not method().needs & adapter.lacks for family, adapter in FAMILIES.items()}
        for name, method in methods().items()
    }


def every_method(config: Any, layers: int | None = None) -> list[str]:
    """Returns all methods but `none` that work on models of a configuration, with another number of
    decoder `layers` where given; the others are named on stderr.
    """
    chosen, lacks = [], FAMILIES[config.model_type].lacks
    depth = layers or config.get_text_config().num_hidden_layers
    for name, method in methods().items():
        lacking = sorted(method().needs_on(depth) & lacks)
        if lacking:
            print(f"{name} left out: it needs {' and '.join(lacking)}", file=sys.stderr)
        elif name != "none":
            chosen.append(name)
    return chosen


def named_methods(names: str, config: Callable[[], Any], layers: int | None = None) -> list[str]:
    """Returns the methods named, comma-separated; for `all` every one that works on the model.

    Args:
        names: of methods.
        config: returns the model's configuration.
        layers: as for `every_method`.

    Raises:
        InputError: when there is none.
    """
    if names == "all":
        return every_method(config(), layers)
    chosen = [name for name in names.split(",") if name]
    if not chosen:
        raise InputError("no method given; see 'vlm-prune methods'")
    return chosen


def support_table() -> str:
    """Returns `support` as a table in Markdown."""
    return _table(
        {
            name: {family: "yes" if supported else "" for family, supported in works.items()}
            for name, works in support().items()
        }
    )


def _table(cells: dict[str, dict[str, str]]) -> str:
    """Returns a table in Markdown of a cell for each method and family."""
    families = list(cells["none"])
    rows = [["method", *(f"`{family}`" for family in families)]]
    for name, row in cells.items():
        rows.append([f"`{name}`", *(cell or "-" for cell in row.values())])
    return as_markdown(rows)


def serving_support() -> dict[str, dict[str, str]]:
    """Returns how vLLM serves every method and family.

    It is `plug-in`, `embeddings` (chosen by `image_embeds`), or an empty text where it does not.
    """
    families = [
        name for name in FAMILIES if MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[name] in CLASSES
    ]
    return {
        name: {family: _route(name, family) if works[family] else "" for family in families}
        for name, works in support().items()
    }


def _route(method: str, family: str) -> str:
    pruner = methods()[method]()
    for route, checks in (
        (
            "plug-in",
            (
                lambda: Settings.read({"method": method}),
                lambda: check_lacks(method, pruner, family),
            ),
        ),
        ("embeddings", (lambda: check_sendable(pruner, family),)),
    ):
        try:
            for check in checks:
                check()
        except InputError:
            continue
        return route
    return ""


def serving_table() -> str:
    """Returns `serving_support` as a table in Markdown, of the methods that are served at all."""
    served = {name: routes for name, routes in serving_support().items() if any(routes.values())}
    return _table(served)
