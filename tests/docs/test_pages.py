"""The documentation speaks of everything that is registered, and its figures are the measured ones."""

import importlib.util
import inspect
import pkgutil
import re
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import typer

from vlm_prune.benchmarks.cli.commands import app
from vlm_prune.benchmarks.speed.shapes import SHAPES
from vlm_prune.continual.methods import METHODS as LEARNERS
from vlm_prune.pruning import METHODS
from vlm_prune.pruning.attention import ATTENTION
from vlm_prune.vlm.families import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
METHODS_PAGE = (ROOT / "docs/methods.md").read_text()
README = (ROOT / "README.md").read_text()
EXPORTS = (
    "pruning", "pruning.attention", "learners", "continual.methods", "continual.streams", "vlm",
    "vlm.families", "kernels.attention_received", "kernels.compact_tokens", "kernels.greedy_select",
    "kernels.pairwise_cosine", "kernels.text_guided_score", "kernels.token_sensitivity",
)  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_each_method_has_a_section_and_rows(name):
    assert f"\n### `{name}`\n" in METHODS_PAGE, f"docs/methods.md has no section for {name}"
    if name != "none":
        for page in (METHODS_PAGE, README):
            assert f"\n| `{name}` |" in page, f"no row of the table of methods for {name}"


@pytest.mark.parametrize("name", ATTENTION)
def test_each_method_of_sparse_attention_has_rows(name):
    page = (ROOT / "docs/sparse_attention.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
    assert len(rows) == 2, "one row says what it keeps, one its figures"
    assert ATTENTION[name].paper in rows[0]


def referenced() -> set[str]:
    """Dotted names that the API reference documents: one after each `:::`, or its members."""
    names = set()
    page = (ROOT / "docs/api.md").read_text()
    for name, members in re.findall(
        r"^::: (\S+)(?:\n    options:\n      members: \[(.+)\])?", page, re.MULTILINE
    ):
        names |= {f"{name}.{member}" for member in members.split(", ")} if members else {name}
    return names


@pytest.mark.parametrize("package", EXPORTS)
def test_the_api_reference_has_what_a_package_exports(package):
    module = import_module(f"vlm_prune.{package}")
    exported = [getattr(module, name) for name in module.__all__]
    public = [one for one in exported if inspect.isclass(one) or inspect.isfunction(one)]
    assert public
    named = {f"{one.__module__}.{one.__name__}" for one in public}
    assert not named - referenced()


@pytest.mark.parametrize("registry", [METHODS, ATTENTION, LEARNERS], ids=lambda r: r.kind)
def test_the_api_reference_has_every_registered_class(registry):
    named = {f"{kind.__module__}.{kind.__name__}" for kind in registry.values()}
    assert named and not named - referenced()


def test_what_the_api_reference_names_is_there():
    for name in referenced():
        pkgutil.resolve_name(name)


def test_pages_name_all_commands_shapes_extras_and_kernels():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    commands = typer.main.get_command(app).commands
    operations = {op.parent.name for op in (ROOT / "kernels").glob("*/op.py")}
    named = {
        "commands.md": [
            *(f"`{name}`" for name, command in commands.items() if not command.hidden),
            *(rf"\b{re.escape(name)}\b" for name in SHAPES),
        ],
        "index.md": [f"`{name}`" for name in project["optional-dependencies"]],
        "kernels.md": [f"\n\\| `{name}` \\|" for name in operations],
    }
    for page, names in named.items():
        text = (ROOT / "docs" / page).read_text()
        assert names and not [name for name in names if not re.search(name, text)], page


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_has_a_row(name):
    assert f"\n| `{name}` |" in (ROOT / "docs/families.md").read_text()


def test_tables_are_those_of_the_registries_and_results():
    path = ROOT / "scripts/document_tables.py"
    spec = importlib.util.spec_from_file_location("document_tables", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for page, content in script.pages().items():
        assert (ROOT / page).read_text() == content, f"{page} is stale: make tables"


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


def test_links_of_the_readme_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(ROOT / "docs/notebooks/quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "clear the notebook's outputs"
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    assert all(cell.outputs for cell in notebook.cells if cell.cell_type == "code")
