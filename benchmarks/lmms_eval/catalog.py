"""Which tasks lmms-eval and we have, and where each is defined."""

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vlm_prune.benchmarks.tasks import TASKS
from vlm_prune.vlm.common.errors import InputError

TASK_FOLDER = Path(__file__).parent / "tasks"
# a key that names tasks, and its value: on the line, or a list on those below
NAMED = re.compile(
    r"""^["']?(?:task|group|tag)["']?[ \t]*:[ \t]*(.*(?:\n[ \t]*-.*)*)""", re.MULTILINE
)


@cache
def possible_names() -> frozenset[str]:
    """Returns the names of all tasks, groups and tags, among words that
    are none; it takes a second.

    Files are searched, not parsed.
    """
    found = set[str]()
    spec = find_spec("lmms_eval")
    packages = list(spec.submodule_search_locations or ()) if spec is not None else []
    for folder in (*(Path(package) / "tasks" for package in packages), TASK_FOLDER):
        for file in folder.rglob("*yaml"):
            for value in NAMED.findall(file.read_text(encoding="utf-8", errors="replace")):
                found |= set(re.findall(r"[\w.+/@-]*\w[\w.+/@-]*", value))
    return frozenset(found)


@cache
def catalog() -> Any:
    """Returns lmms-eval's index of all its tasks and of ours; building it reads some 2000 files."""
    from lmms_eval.tasks import TaskManager
    from loguru import logger

    logger.disable("lmms_eval")
    return TaskManager(include_path=str(TASK_FOLDER))


def leaves(name: str) -> list[str]:
    """Returns the tasks that a name stands for: itself, or the members of a group or tag."""
    if name in TASKS:
        name = f"vlm_prune_{name}"
    entry = catalog().task_index.get(name)
    if entry is None:
        raise InputError(f"lmms-eval has no task {name!r}")
    if entry["type"] in ("task", "python_task"):
        return [name]
    members = entry["task"] if entry["type"] == "tag" else settings(name)["task"]
    names = [member if isinstance(member, str) else member["task"] for member in members]
    return [leaf for member in names if isinstance(member, str) for leaf in leaves(member)]


def settings(name: str) -> dict[str, Any]:
    """Returns a task's whole configuration, its functions imported.

    Raises:
        InputError: if the task needs a package that is not installed.
    """
    from lmms_eval.utils import load_yaml_config

    path = catalog().task_index[name]["yaml_path"]
    try:
        config: dict[str, Any] = load_yaml_config(path, mode="full")
    except ImportError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        missing = getattr(cause, "name", None)
        what = f"the package {missing!r}" if missing else f"something missing ({cause})"
        raise InputError(f"task {name!r} needs {what}; install it, or lmms-eval whole") from error
    return config
