"""The documentation speaks of everything that is registered, and its figures are the measured ones."""

import importlib.util
import re
from pathlib import Path

import pytest

from vlm_prune.pruning import METHODS
from vlm_prune.pruning.attention import ATTENTION
from vlm_prune.vlm.families import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
METHODS_PAGE = (ROOT / "docs/methods.md").read_text()
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", METHODS)
def test_each_method_has_a_section_and_rows(name):
    assert f"\n### `{name}`\n" in METHODS_PAGE, f"docs/methods.md has no section for {name}"
    if name != "none":
        for page in (METHODS_PAGE, README):
            assert f"\n| `{name}` |" in page, f"no row of the table of methods for {name}"


@pytest.mark.parametrize("name", ATTENTION)
def test_each_method_of_sparse_attention_has_a_row(name):
    page = (ROOT / "docs/sparse_attention.md").read_text()
    (row,) = (line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
    assert ATTENTION[name].paper in row


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
