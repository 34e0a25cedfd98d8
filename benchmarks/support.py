"""Which method works on which model family, from what the one needs and the other lacks."""

from vlm_prune.vlm.families import FAMILIES
from vlm_prune.vlm.wrapper import methods


def support() -> dict[str, dict[str, bool]]:
    """For every method and family whether it works; where not, the method says so in one line."""
    return {
        name: {family: not method().needs & adapter.lacks for family, adapter in FAMILIES.items()}
        for name, method in methods().items()
    }


def markdown() -> str:
    """The same as a table."""
    rows = [("method", *(f"`{family}`" for family in FAMILIES)), ("---",) * (1 + len(FAMILIES))]
    for name, works in support().items():
        rows.append((f"`{name}`", *("yes" if there else "-" for there in works.values())))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
