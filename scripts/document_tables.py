"""Fill the tables of README and docs from the registries and the measured results: `make tables`."""

import re
from pathlib import Path

from vlm_prune.benchmarks.cli.app import run_command
from vlm_prune.benchmarks.cli.support import serving_table, support_table
from vlm_prune.benchmarks.stats.table import as_markdown
from vlm_prune.pruning import METHODS

ROOT = Path(__file__).resolve().parents[1]
BUDGET = "64"


def pages() -> dict[str, str]:
    """Returns the pages that hold such tables, by path, with their tables as they should be."""
    overview = read_table("docs/results/compare.md").split("\n\n")[1]
    on_tiny = retained_at(BUDGET, "docs/results/newer_methods.md", "docs/results/compare.md")
    on_smol = retained_at(BUDGET, "docs/results/smol/compare.md")
    return {
        "README.md": with_columns(read_table("README.md"), on_smol),
        "docs/methods.md": between(
            with_columns(read_table("docs/methods.md"), on_tiny, on_smol), "positions", positions()
        ),
        "docs/families.md": between(read_table("docs/families.md"), "matrix", support_table()),
        "docs/serve.md": between(read_table("docs/serve.md"), "served", serving_table()),
        "docs/results.md": between(
            read_table("docs/results.md"), "overview", f"{overview.strip()}\n"
        ),
    }


def read_table(page: str) -> str:
    """Returns the text of a page of the repository."""
    return (ROOT / page).read_text()


def retained_at(budget: str, *results: str) -> dict[str, str]:
    """Returns what each method of some comparisons retained at the budget, with its interval."""
    retained: dict[str, str] = {}
    for page in results:
        lines = [line for line in read_table(page).splitlines() if line.startswith("|")]
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        column = next(i for i, name in enumerate(rows[0]) if name.startswith("% retained"))
        same = [row for row in rows if len(row) == len(rows[0]) and row[1] == budget]
        retained |= {row[0].split(" (")[0]: row[column] for row in same}
    return retained


def with_columns(page: str, *columns: dict[str, str]) -> str:
    """Returns the page with these values behind the first four columns, in rows of tables that wide
    which begin with a method.
    """

    def filled(row: re.Match[str]) -> str:
        cells = (values.get(row[2], "") for values in columns)
        return " ".join([row[1], *(f"{cell} |" for cell in cells)])

    wide = rf"^(\| `([\w-]+)` \|(?:[^|\n]*\|){{3}})(?:[^|\n]*\|){{{len(columns)}}}$"
    return re.sub(wide, filled, page, flags=re.MULTILINE)


def positions() -> str:
    """Returns where each method acts and what its authors do with positions, as a table."""
    rows = [
        (f"`{name}`", method.stage, method.authors_positions) for name, method in METHODS.items()
    ]
    return as_markdown([("method", "acts at", "positions"), *rows])


def between(page: str, mark: str, table: str) -> str:
    """Returns the page with the table between the comments `mark` and `end`.

    Args:
        page: its text.
        mark: word in the comment before the table.
        table: Markdown.
    """
    before, rest = page.split(f"<!-- {mark} -->\n")
    return f"{before}<!-- {mark} -->\n{table}{rest[rest.index('<!-- end -->') :]}"


def main() -> None:
    """Writes the pages anew."""
    for page, content in pages().items():
        (ROOT / page).write_text(content)


if __name__ == "__main__":
    run_command(main)
