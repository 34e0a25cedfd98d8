"""What the repository's rules for names and docstrings find in the source, as plain AST checks.

`python tests/language.py FOLDER...` prints each finding.
"""

import ast
import re
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("kernels", "vlm", "pruning", "learners", "continual", "benchmarks", "scripts")
FROM_ARGUMENTS = 3
PRIVATE_FROM_ARGUMENTS = 5
# what is written there as JSON is a record
TYPED = (
    "benchmarks/evaluation",
    "benchmarks/experiments/forgetting",
    "benchmarks/speed/attention.py",
    "benchmarks/speed/bench.py",
    "benchmarks/speed/bench_table.py",
    "benchmarks/speed/serving.py",
    "benchmarks/speed/wings_cost.py",
    "benchmarks/lmms_eval/answers.py",
    "benchmarks/lmms_eval/throughput.py",
)
INTERFACES = ("main", "ask")
BRITISH = re.compile(
    r"(?i)(col|neighb|fav|behavi|lab)our|grey|centre|licence|labell|modell|learnt|analys(e|ing)|afterwards|"
    r"(normal|initial|optim|summar|orthogonal|minim|maxim|serial|organ|recogn|visual|quant|token|"
    r"general|regular|vector|parallel|synchron|penal)is(e|ing|ation)"
)
CHECKED = {tokenize.NAME, tokenize.COMMENT, tokenize.STRING}
CHECKED |= {getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}  # from Python 3.12 on
# words that drawings and trained weights have, and names of before
DATA = {'"grey"', '"colours"', '"the colour {}."', '"normalised"', '"Labelled"', '"LabelledImages"'}
PROSE = {
    "asked", "as_short", "claim", "heard", "hidden: tensor", "made", "ride_along", "spare", "standing", "stands", "twin", "wake",
}  # fmt: skip
# How docstrings of functions begin, in the third person; add a verb where none of these says it.
VERBS = set(
    re.findall(
        r"[\w-]+",
        """
    accepts acts adds answers appends applies asks attaches attends averages brings builds checks
    chooses classifies closes clusters compares computes copies counts crops cuts draws drops
    empties encodes ends fills finds fine-tunes fits formats frees freezes gathers generates gives
    groups imports interpolates joins keeps lays leaves lets loads logs lowers makes maps measures merges
    moves notes numbers opens pads pre-trains prepares prints projects proposes prunes puts raises
    reads records refuses registers removes renames renders reorders repeats replaces returns
    rewrites runs samples saves says scales scores searches seeds selects sends serves sets shows
    shrinks shuffles splits starts stops stores takes teaches tells times tokenizes trains turns
    undoes unlocks updates uses waits wraps writes yields
    """,
    )
)
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
COMMAND_OPTIONS = ROOT / "benchmarks/cli/options.py"


@dataclass(frozen=True)
class Found:
    """One definition in the source: its file, its line, its name with that of its class, its node."""

    path: Path
    name: str
    node: Definition | ast.Assign

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.node.lineno} {self.name}"


@cache
def definitions(path: Path) -> tuple[Found, ...]:
    """Functions, classes and methods of a file; those inside functions are nobody else's."""
    return tuple(_walk(path))


def _walk(path: Path) -> Iterator[Found]:
    pending: list[tuple[str, ast.AST]] = [("", ast.parse(path.read_text()))]
    while pending:
        prefix, parent = pending.pop(0)
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, Definition):
                yield Found(path, prefix + node.name, node)
            if isinstance(node, ast.ClassDef):
                pending.append((f"{prefix}{node.name}.", node))
            elif isinstance(node, ast.If | ast.Try):
                pending.append((prefix, node))


def source(*folders: str) -> list[Found]:
    """Definitions of all files below these folders of the repository, or of these files."""
    return [found for path in files(*folders) for found in definitions(path)]


def files(*folders: str) -> list[Path]:
    """The files below these folders of the repository, or these files."""
    return [
        path
        for folder in folders
        for path in (
            [ROOT / folder] if folder.endswith(".py") else sorted((ROOT / folder).rglob("*.py"))
        )
    ]


def undocumented(*folders: str) -> list[Found]:
    """Functions of three or more arguments, private ones of five, whose docstring has no `Args:`.

    Left out: what a documented method of the same name in another class already describes, commands
    whose options carry their own help, and the implementations of an operation of `kernels`,
    whose `op` describes them.
    """
    everything = source(*PACKAGES)
    documented = [f for f in everything if "Args:" in (ast.get_docstring(f.node) or "")]
    described = {f.node.name for f in documented if "." in f.name}
    classes = {(f.path, f.name) for f in documented if isinstance(f.node, ast.ClassDef)}
    operations = {(f.path.parent, f.name) for f in documented if f.path.name == "op.py"}
    return [
        found
        for found in source(*folders)
        if isinstance(found.node, ast.FunctionDef)
        and len(arguments(found.node))
        >= (FROM_ARGUMENTS if is_public(found.name) else PRIVATE_FROM_ARGUMENTS)
        and "Args:" not in (ast.get_docstring(found.node) or "")
        and not ("." in found.name and found.node.name in described)
        and (found.path, found.name.removesuffix(".__init__")) not in classes
        and (found.path.parent, found.name) not in operations
        and not any(decorator(d) in ("overload", "triton.jit") for d in found.node.decorator_list)
        and not is_command(found)
    ]


def is_public(name: str) -> bool:
    """Whether no part of a dotted name is private; `__call__` and the like are public."""
    return all(not part.startswith("_") or part.startswith("__") for part in name.split("."))


def arguments(function: ast.FunctionDef) -> list[ast.arg]:
    """A function's parameters without `self` and `cls`, starred ones included."""
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    named += [star for star in (given.vararg, given.kwarg) if star is not None]
    return [argument for argument in named if argument.arg not in ("self", "cls")]


def decorator(node: ast.expr) -> str:
    return ast.unparse(node.func if isinstance(node, ast.Call) else node)


def carries_help(argument: ast.arg) -> bool:
    """Whether an annotation says what the parameter is: `Annotated[...]`, or an alias of one."""
    annotation = ast.unparse(argument.annotation) if argument.annotation else ""
    return annotation.startswith("Annotated[") or annotation in OPTIONS


OPTIONS = set(re.findall(r"^(\w+) = Annotated\[", COMMAND_OPTIONS.read_text(), re.MULTILINE)) | {
    "typer.Context"
}


def repeated(*folders: str) -> dict[str, list[Found]]:
    """Names of public functions, of classes and of types that more than one file defines at its top
    level.

    Left out: the options of commands, which are named as they are typed, the `main` of scripts, the `ask` of tasks, and the names of `kernels`' operations, each
    of which has its reference and its kernel under its own name.
    """
    wanted = {str(path) for path in files(*folders)}
    by_name: dict[str, list[Found]] = defaultdict(list)
    for found in dict.fromkeys(source(*PACKAGES, *folders)):
        is_class = isinstance(found.node, ast.ClassDef)
        public = not found.name.startswith("_") and found.name not in INTERFACES
        if "." not in found.name and (is_class or public):
            by_name[found.name].append(found)
    for path in dict.fromkeys(files(*PACKAGES, *folders)):
        for name, node in type_aliases(path):
            by_name[name].append(Found(path, name, node))
    return {
        name: places
        for name, places in sorted(by_name.items())
        if len({home(place) for place in places}) > 1
        and any(str(place.path) in wanted for place in places)
    }


def type_aliases(path: Path) -> Iterator[tuple[str, ast.Assign]]:
    """Names in CamelCase that a file gives to types at its top level: `Scores = dict[str, float]`."""
    if path == COMMAND_OPTIONS:
        return
    for node in ast.parse(path.read_text()).body:
        name = node.targets[0].id if is_plain(node) else ""
        if re.fullmatch(r"([A-Z][a-z]+)+", name):
            yield name, node


def is_plain(node: ast.stmt) -> bool:
    """Returns whether a statement gives a value to one name."""
    return isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)


def home(found: Found) -> Path:
    """The file of a definition; for an operation of `kernels` the folder of its implementations."""
    folder = found.path.parent
    return folder if folder.parent == ROOT / "kernels" else found.path


def british(*folders: str) -> list[str]:
    """Identifiers, comments, docstrings and other texts with a British spelling, but for `DATA`."""
    return [
        f"{path}:{token.start[0]} {token.string}"
        for path in files(*folders)
        for token in tokenize.generate_tokens(path.open().readline)
        if token.type in CHECKED and BRITISH.search(token.string) and token.string not in DATA
    ]


def prose(*folders: str) -> list[str]:
    """Variables, arguments, functions and classes whose name says nothing of what they hold."""
    return [
        f"{path}:{node.lineno} {name}"
        for path in files(*folders)
        for node in ast.walk(ast.parse(path.read_text()))
        if (name := bound_name(node)).lower() in PROSE
    ]


def bound_name(node: ast.AST) -> str:
    """The name that a node binds; empty where it binds none."""
    match node:
        case ast.arg(arg="hidden", annotation=ast.Name(id="Tensor")):
            return "hidden: Tensor"  # Hugging Face says hidden_states
        case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name):
            return name
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
            return name
    return ""


def untyped_records(*folders: str) -> list[Found]:
    """Definitions whose signature, fields or variables say `dict[str, Any]`."""
    return [
        found
        for found in source(*folders)
        if isinstance(found.node, ast.FunctionDef | ast.ClassDef)
        and re.search(r"\bdict\[str, Any\]", signature(found.node))
    ]


def signature(node: ast.FunctionDef | ast.ClassDef) -> str:
    """The annotations of a function's parameters, result and variables, or of a class's fields."""
    if isinstance(node, ast.FunctionDef):
        given = [argument.annotation for argument in arguments(node)] + [node.returns]
        given += [inner.annotation for inner in ast.walk(node) if isinstance(inner, ast.AnnAssign)]
    else:
        given = [field.annotation for field in node.body if isinstance(field, ast.AnnAssign)]
    return " ".join(ast.unparse(annotation) for annotation in given if annotation)


def missing_docstrings(*folders: str) -> list[Found]:
    """Public functions, classes and methods without a docstring of their own or of a base."""
    described = {f.name.split(".")[-1] for f in source(*PACKAGES) if ast.get_docstring(f.node)}
    return [
        found
        for found in source(*folders)
        if is_public(found.name)
        and not ast.get_docstring(found.node)
        and not ("." in found.name and found.node.name in described)
        and not found.node.name.startswith("__")
    ]


def misdocumented(*folders: str) -> list[str]:
    """Functions whose `Args:` names another parameter than they have, or leaves one out.

    Triton's kernels may leave out block sizes and the like.
    """
    found = []
    for place in source(*folders):
        if isinstance(place.node, ast.FunctionDef):
            named = documented_arguments(ast.get_docstring(place.node) or "")
            real = {argument.arg for argument in arguments(place.node)} - {"_"}
            kernel = any(decorator(d) == "triton.jit" for d in place.node.decorator_list)
            wrong = (named - {"_"} - real) | (real - named if named and not kernel else set())
            at = f"{place.path}:{place.node.lineno} {place.name}"
            found += [f"{at} {name}" for name in sorted(wrong)]
    return found


def documented_arguments(docstring: str) -> set[str]:
    """The names that stand under `Args:`; several may share a line."""
    block = re.search(r"^Args:\n((?: {4}.*\n?|\n)+)", docstring, re.MULTILINE)
    entries = re.findall(r"^ {4}(\S[\w, *]*):", block[1] if block else "", re.MULTILINE)
    return {name.strip(" *") for entry in entries for name in entry.split(",")}


def verbless(*folders: str) -> list[Found]:
    """Functions whose docstring does not begin with a verb, or whose first sentence has no end.

    Left out: commands, whose docstring is the help that a terminal shows.
    """
    return [
        found
        for found in source(*folders)
        if not isinstance(found.node, ast.ClassDef)
        and not is_command(found)
        and (text := ast.get_docstring(found.node))
        and not (begins_with_verb(text) and text.split("\n\n")[0].rstrip().endswith((".", ":")))
    ]


def begins_with_verb(text: str) -> bool:
    """Whether a text begins with one of `VERBS`, and not with the plural of a noun: scores of ..."""
    first, *more = text.split()
    return first.rstrip(".,").lower() in VERBS and more[:1] != ["of"]


def is_command(found: Found) -> bool:
    """Whether a function is a command: of `cli`, named as its file or with options that carry help."""
    if found.path.parent != ROOT / "benchmarks/cli" or not isinstance(found.node, ast.FunctionDef):
        return False
    options = (carries_help(argument) for argument in arguments(found.node))
    return found.path.stem == found.name or any(options)


if __name__ == "__main__":
    chosen = sys.argv[1:] or PACKAGES
    for folder in chosen:
        undoc, nodoc = undocumented(folder), missing_docstrings(folder)
        print(f"== {folder}: {len(undoc)} without Args, {len(nodoc)} without docstring")
        for found in (*undoc, *nodoc):
            print("  ", found, "" if found in nodoc else "(Args)")
        for found in verbless(folder):
            print("  ", found, "(no verb)")
    names = repeated(*chosen)
    print(f"== {len(names)} names in more than one file")
    for name, places in names.items():
        print("  ", name, *(str(place.path.relative_to(ROOT)) for place in places))
    records = untyped_records(*TYPED)
    print(f"== {len(records)} dict[str, Any] where records are typed")
    for found in records:
        print("  ", found)
