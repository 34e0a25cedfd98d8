"""The package list in pyproject.toml must name every importable folder; imports stay one-way."""

import ast
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "vlm": {"vlm", "kernels"},
    "vlm/serving": {"vlm", "pruning", "kernels"},  # serves the methods
    "kernels": {"kernels"},
    "pruning": {"pruning", "vlm", "kernels"},
    "learners": {"learners", "vlm", "kernels"},
    "continual": {"continual", "vlm", "kernels"},
    "benchmarks": {"benchmarks", "pruning", "learners", "continual", "vlm", "kernels"},
}


REEXPORTS = {(ROOT / "vlm" / "__init__.py", "vlm_prune.pruning.pipeline")}


def test_every_package_is_listed():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {v: k for k, v in config["package-dir"].items()}
    found = {
        ".".join([prefix, *init.parent.relative_to(ROOT / folder).parts])
        for folder, prefix in folders.items()
        for init in (ROOT / folder).rglob("__init__.py")
    }
    assert found <= set(config["packages"])


def test_kernels_folder_stays_a_namespace():
    # a kernels/__init__.py at the repository root hides the Hub's `kernels` from transformers
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_imports_go_one_way():
    for folder, allowed in MAY_IMPORT.items():
        others = [ROOT / other for other in MAY_IMPORT if other.startswith(f"{folder}/")]
        for path in (ROOT / folder).rglob("*.py"):
            if any(path.is_relative_to(other) for other in others):
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                module = getattr(node, "module", None) if isinstance(node, ast.ImportFrom) else None
                names = [module or ""]
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                for name in names:
                    if name.startswith("vlm_prune.") and (path, name) not in REEXPORTS:
                        assert name.split(".")[1] in allowed, f"{path} imports {name}"


def test_the_command_line_starts_without_torch():
    code = "import sys, vlm_prune.benchmarks.cli.commands; print('torch' in sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd="/"
    )
    assert out.stdout.strip() == "False", out.stderr


def imported(path, modules):
    """Modules of ours that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in modules else node.module


def test_no_module_imports_itself_through_others():
    modules = {
        ".".join(["vlm_prune", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(
            ".__init__"
        ): path
        for folder in MAY_IMPORT
        for path in (ROOT / folder).rglob("*.py")
    }
    graph = {
        name: set(imported(path, modules)) & modules.keys() - {name}
        for name, path in modules.items()
    }
    TopologicalSorter(graph).prepare()  # names the modules of a cycle
