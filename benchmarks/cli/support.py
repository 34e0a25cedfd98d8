"""Which method works on which model family, from what the one needs and the other lacks."""

import sys
from collections.abc import Callable

from vlm_prune.pruning.registry import methods
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.families import FAMILIES, Family


def support() -> dict[str, dict[str, bool]]:
    """For every method and family whether it works; where not, the method says so in one line."""
    return {
        name: {family: not method().needs & adapter.lacks for family, adapter in FAMILIES.items()}
        for name, method in methods().items()
    }


def every_method(family: type[Family]) -> list[str]:
    """All methods but `none` that work on a family; the others are named on stderr."""
    chosen = []
    for name, method in methods().items():
        lacking = sorted(method().needs & family.lacks)
        if lacking:
            print(f"{name} left out: it needs {' and '.join(lacking)}", file=sys.stderr)
        elif name != "none":
            chosen.append(name)
    return chosen


def named_methods(names: str, family: Callable[[], type[Family]]) -> list[str]:
    """Those named, comma-separated; for `all` every one that works on the family.

    Raises:
        InputError: when there is none.
    """
    if names == "all":
        return every_method(family())
    chosen = [name for name in names.split(",") if name]
    if not chosen:
        raise InputError("no method given; see 'vlm-prune methods'")
    return chosen


def support_table() -> str:
    """`support` as a table."""
    rows = [("method", *(f"`{family}`" for family in FAMILIES)), ("---",) * (1 + len(FAMILIES))]
    for name, works in support().items():
        rows.append((f"`{name}`", *("yes" if there else "-" for there in works.values())))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
