"""lmms-eval: our model as its plug-in, and its tasks under `vlm-prune eval`. Imports no torch."""

import difflib
import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.registry import unknown

INSTALL = "pip install 'vlm-prune[eval]' && pip install --no-deps lmms_eval==0.7.3"


def manifests() -> Any:
    """Returns what the entry point `lmms_eval.models` gives: `--model vlm_prune`.

    lmms-eval sends multiple-choice tasks to simple-mode models alone, hence `--force_simple`.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    return [
        ModelManifest(
            model_id="vlm_prune",
            chat_class_path="vlm_prune.benchmarks.lmms_eval.model.PrunedChat",
            simple_class_path="vlm_prune.benchmarks.lmms_eval.model.PrunedSimple",
        )
    ]


def installed() -> bool:
    """Returns whether lmms-eval can be imported, without importing it."""
    return find_spec("lmms_eval") is not None


def needed(tasks: Sequence[str]) -> bool:
    """Returns whether lmms-eval has to run them: some are its own, or
    several processes share the work.
    """
    from vlm_prune.benchmarks.tasks import TASKS

    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several and not installed():
        raise InputError(f"sharing the work among processes takes lmms-eval: {INSTALL}")
    return several or any(name not in TASKS for name in tasks)


def check_tasks(names: list[str], embedded: list[str]) -> None:
    """Raises `InputError` unless every name is a task or group of lmms-eval, which is installed."""
    if not installed():
        if difflib.get_close_matches(names[0], embedded, n=1):
            raise InputError(unknown("task", names[0], embedded))
        raise InputError(f"task {names[0]!r} is not embedded; for lmms-eval's tasks: {INSTALL}")
    from vlm_prune.benchmarks.lmms_eval.catalog import catalog, possible_names

    for known in (possible_names, lambda: catalog().all_tasks):  # the quicker one first
        for name in names:
            if name not in known():
                raise InputError(unknown("task", name, [*embedded, *sorted(known())]))
