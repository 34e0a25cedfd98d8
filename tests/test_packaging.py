"""The package list in pyproject.toml must name every importable folder; imports stay one-way."""

import ast
import re
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOTS = ("vlm", "kernels", "pruning", "learners", "continual", "benchmarks")
LOWER = ("kernels", "vlm", "vlm/serving", "pruning", "pruning/attention", "learners", "continual")
REEXPORTS = {("vlm/__init__.py", "pruning")}


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


def rooms():
    """Each room of the table in CONTRIBUTING with those that it may import beside itself."""
    table = {}
    for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines():
        cells = line.split("|")
        if line.startswith("| `") and cells[1].strip().endswith("/`"):
            for room in re.findall(r"`([\w/]+)/`", cells[1]):
                table[room] = re.findall(r"`([\w/]+)`", cells[3])
    allowed = {}
    for room, named in table.items():
        inside = room.startswith("benchmarks/")
        others = {f"benchmarks/{name}" if inside else name for name in named} | {room}
        if inside:
            others |= set(LOWER)
        if room == "benchmarks/cli":
            others |= {other for other in table if other.startswith("benchmarks")}
        if "vlm" in others:
            others |= {other for other in table if other.startswith("vlm/")} - {"vlm/serving"}
        allowed[room] = others
    return allowed


def room_of(path, names):
    """The innermost room of the table that holds a file or folder."""
    return next(str(parent) for parent in (path, *path.parents) if str(parent) in names)


def test_imports_follow_the_table_of_rooms():
    allowed, modules = rooms(), our_modules()
    assert len(allowed) > 20 and allowed["kernels"] == {"kernels"}
    wrong = []
    for path in modules.values():
        file = path.relative_to(ROOT)
        for name in set(imported(path, modules)) & modules.keys():
            other = room_of(modules[name].relative_to(ROOT), allowed)
            if other not in allowed[room_of(file, allowed)] and (str(file), other) not in REEXPORTS:
                wrong.append(f"{file} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_rooms_do_not_import_each_other_in_circles():
    allowed, modules = rooms(), our_modules()
    graph = {room: set() for room in allowed if not room.startswith("vlm")}
    for path in modules.values():
        room = room_of(path.relative_to(ROOT), allowed)
        if room in graph:
            found = {modules[name] for name in set(imported(path, modules)) & modules.keys()}
            graph[room] |= {room_of(p.relative_to(ROOT), allowed) for p in found} & graph.keys()
            graph[room].discard(room)
    TopologicalSorter(graph).prepare()  # names the rooms of a cycle


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


def our_modules():
    """The file of every module."""
    return {
        ".".join(["vlm_prune", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(
            ".__init__"
        ): path
        for folder in ROOTS
        for path in (ROOT / folder).rglob("*.py")
    }


def test_no_module_imports_itself_through_others():
    modules = our_modules()
    graph = {
        name: set(imported(path, modules)) & modules.keys() - {name}
        for name, path in modules.items()
    }
    TopologicalSorter(graph).prepare()  # names the modules of a cycle
