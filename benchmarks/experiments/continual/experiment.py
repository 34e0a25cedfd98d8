"""All continual learners over seeds on an embedded stream; killed at any moment, it resumes.

Learning rates, and CoDyRA-plus's importance, are chosen on validation images of the first tasks of
`packaged` at seed 0, whichever stream is compared; test images are first seen by the runs that are
reported. Some methods take over another's rate: a control that of what it is a control for, a
relative of full fine-tuning or LoRA theirs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec

from vlm_prune.benchmarks.evaluation.records import Amount, Count, Share
from vlm_prune.benchmarks.experiments.continual.learn import (
    fewer,
    learn_tasks,
    method_of,
    recipe_of,
)
from vlm_prune.continual.clip import load_clip
from vlm_prune.continual.methods import Method
from vlm_prune.continual.streams import EMBEDDED, Stream, StreamTask, open_stream
from vlm_prune.continual.streams.unseen import unseen_scenes
from vlm_prune.continual.train import ContinualRun
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.files import write_json
from vlm_prune.vlm.common.folder import OutputFolder, record_settings
from vlm_prune.vlm.common.records import read_record

OUTSIDE = "scenes"
SEARCHED = "packaged"
ADAPTER_RATES, FULL_RATES = (3e-4, 1e-3, 3e-3, 1e-2), (3e-5, 1e-4, 3e-4)


@dataclass(frozen=True)
class ContinualArm:
    """One line of the comparison.

    Args:
        method: name of the learner.
        rate: name of the arm whose chosen learning rate it takes; "" for one that takes no steps.
        options: that differ from the method's own.
        follows: option that takes the folder of CoDyRA's run with the same seed.
    """

    method: str
    rate: str
    options: Mapping[str, Any] = field(default_factory=dict)
    follows: str = ""


ARMS = {
    "codyra": ContinualArm("codyra", "codyra"),
    "lora": ContinualArm("lora", "lora"),
    "random-rank, codyra's counts": ContinualArm("random-rank", "codyra", follows="like"),
    "random-rank, codyra's counts and norms": ContinualArm(
        "random-rank", "codyra", {"match_norm": True}, follows="like"
    ),
    "lora, codyra's norms": ContinualArm("lora", "lora", follows="match"),
    "codyra-plus": ContinualArm("codyra-plus", "codyra-plus"),
    "zero-shot": ContinualArm("zero-shot", ""),
    "rail": ContinualArm("rail", "", {"width": 1024}),
    "full": ContinualArm("full", "full"),
    "wise-ft": ContinualArm("wise-ft", "full"),
    "lwf": ContinualArm("lwf", "full"),
    "zscl": ContinualArm("zscl", "full"),
    "o-lora": ContinualArm("o-lora", "lora"),
    "dora": ContinualArm("dora", "lora"),
    "randlora": ContinualArm("randlora", "randlora"),
    "adalora": ContinualArm("adalora", "adalora", {"interval": 2}),
    "keeplora": ContinualArm("keeplora", "keeplora"),
    "moram": ContinualArm("moram", "moram"),
    "condu": ContinualArm("condu", "condu"),
    "condu, prototypes": ContinualArm("condu", "condu", {"inference": "prototypes"}),
    "lda-text": ContinualArm("lda-text", ""),
}
CANDIDATES: dict[str, list[dict[str, Any]]] = {
    **{name: [{"lr": lr} for lr in ADAPTER_RATES] for name in ("codyra", "lora", "randlora")},
    **{name: [{"lr": lr} for lr in ADAPTER_RATES] for name in ("adalora", "keeplora", "moram")},
    **{name: [{"lr": lr} for lr in FULL_RATES] for name in ("full", "condu")},
    "codyra-plus": [
        {"lr": lr, "importance": kind} for kind in ("product", "taylor") for lr in ADAPTER_RATES[:3]
    ],
}


class Tried(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """One candidate of the search: its options, and Average on the validation images."""

    lr: Annotated[float, msgspec.Meta(gt=0)]
    importance: str | None = None
    average: Annotated[float, msgspec.Meta(ge=0, le=1)]

    @property
    def options(self) -> dict[str, Any]:
        """Returns the options that were tried."""
        return {k: v for k, v in msgspec.to_builtins(self).items() if k != "average"}


class Retained(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is left of the accuracy on the outside set, as `retention` tells it."""

    before: Share
    after: Share
    difference: float
    ci: tuple[float, float]


class UsedRecipe(msgspec.Struct, frozen=True, kw_only=True):
    """Of a recipe, what the page shows."""

    lr: Annotated[float, msgspec.Meta(gt=0)]


class RunReport(msgspec.Struct, frozen=True, kw_only=True):
    """Of the `report.json` of an arm's run, what the experiment goes on with."""

    recipe: UsedRecipe
    retention: dict[str, Retained]
    trainable_parameters: Annotated[list[Count], msgspec.Meta(min_length=1)]
    added_parameters: Annotated[list[Count], msgspec.Meta(min_length=1)]
    update_norms: list[Amount | None]
    drift: Annotated[list[Amount], msgspec.Meta(min_length=1)]

    def __post_init__(self) -> None:
        if OUTSIDE not in self.retention:
            raise ValueError(f"no retention on {OUTSIDE}")


def read_report(folder: Path) -> RunReport | None:
    """Reads the report of a run; None if it has not finished.

    Raises:
        InputError: if it is damaged.
    """
    path = folder / "report.json"
    return (
        read_record(path, RunReport, "remove it; the run is finished again")
        if path.exists()
        else None
    )


def read_search(output: Path) -> dict[str, list[Tried]]:
    """Reads what the search has tried, by arm.

    Raises:
        InputError: if the file is damaged, or tells of other candidates.
    """
    path, advice = output / "search.json", "remove it; finished runs are read again"
    if not path.exists():
        return {}
    record = read_record(path, dict[str, list[Tried]], advice)
    for label, tried in record.items():
        if [one.options for one in tried] != CANDIDATES.get(label, [])[: len(tried)]:
            raise InputError(f"{path} tells of other candidates of {label[:60]!r}; {advice}")
    return record


def read_step_ms(output: Path) -> dict[str, Amount]:
    """Reads the milliseconds of a step by arm, as far as they were taken.

    Raises:
        InputError: if the file is damaged.
    """
    path, advice = output / "step_ms.json", "remove it; it is measured again"
    if not path.exists():
        return {}
    found = read_record(path, dict[str, Amount], advice)
    for label in found:
        if label not in ARMS:
            raise InputError(f"{path} tells of an unknown arm {label[:60]!r}; {advice}")
    return found


@dataclass(frozen=True)
class Experiment:
    """What is compared.

    Args:
        output: folder of the runs; a killed experiment goes on there.
        seeds: number of them, from 0.
        steps: per task; fixed beforehand by the time that the whole may take.
        batch: images per step.
        test_per_class: test images of each class, of the tasks and of the outside set.
        search_tasks: tasks of `packaged` that the search trains on.
        tasks: tasks of the stream; None for all.
        arms: names in `ARMS`; `codyra` first, since some follow it.
        stream: whose tasks are learned, `packaged` or `redrawn`.

    Raises:
        InputError: if the stream is not an embedded one.
    """

    output: Path
    seeds: int = 3
    steps: int = 20
    batch: int = 32
    test_per_class: int = 12
    search_tasks: int = 3
    tasks: int | None = None
    arms: tuple[str, ...] = tuple(ARMS)
    stream: str = SEARCHED

    def __post_init__(self) -> None:
        if self.stream not in EMBEDDED:
            known = " or ".join(EMBEDDED)
            raise InputError(f"learners are not compared on {self.stream!r}; give {known}")

    @property
    def file(self) -> Path:
        """Returns the file where its settings are recorded."""
        return self.output / "experiment.json"

    def settings(self) -> dict[str, Any]:
        """Returns what decides its runs; seeds and arms may grow."""
        names = ("steps", "batch", "test_per_class", "search_tasks", "tasks")
        found = {name: getattr(self, name) for name in names}
        if self.stream != SEARCHED:  # settings of `packaged` do not name it
            found["stream"] = self.stream
        return found | {"weights": load_clip("tiny").fingerprint()}

    def folder(self, label: str, seed: int) -> Path:
        """Returns the folder of one arm's run."""
        return self.output / label.replace(", ", "-").replace("'", "").replace(" ", "-") / f"{seed}"


def run_all(
    experiment: Experiment,
    tell: Callable[[str], None] = print,
    search_from: Path | None = None,
) -> None:
    """Searches, then runs every arm, seed by seed.

    Args:
        experiment: what is compared.
        tell: hears which run begins.
        search_from: folder of another comparison, whose search is taken over.

    Raises:
        InputError: if the folder belongs to other settings or to another CLIP, or the search of
            `search_from` does.
    """
    with OutputFolder(experiment.output):
        if search_from is not None:
            take_search(experiment, search_from)
        record_settings(experiment.file, experiment.settings())
        _run_all(experiment, tell)


def _run_all(experiment: Experiment, tell: Callable[[str], None]) -> None:
    stream, searched = open_stream(experiment.stream), open_stream(SEARCHED)
    used = stream.tasks[: experiment.tasks]
    tasks = tuple(fewer(task, experiment.test_per_class) for task in used)
    outside = fewer(unseen_scenes(), experiment.test_per_class)
    chosen = search_rates(experiment, searched, searched.tasks[: experiment.tasks])
    for seed in range(experiment.seeds):
        for label in experiment.arms:
            tell(f"seed {seed}: {label}")
            run_one(experiment, stream, label, seed, chosen, tasks, outside)


def take_search(experiment: Experiment, folder: Path) -> None:
    """Copies what another comparison's search has found to `search.json`, but for unfinished arms.

    Raises:
        InputError: if `folder` has no search, one with other settings, or another one than that
            which the experiment already has.
    """
    if not (folder / "search.json").exists():
        raise InputError(f"{folder} has no search.json; give the folder of a comparison")
    theirs = read_record(folder / experiment.file.name, dict[str, Any], "give another folder")
    names = ("steps", "batch", "search_tasks", "weights")
    wanted = experiment.settings()
    changed = [name for name in names if theirs.get(name) != wanted[name]]
    most = experiment.search_tasks
    # fewer tasks than the search may have are all that it has
    few, own_few = (
        min(most, tasks) if isinstance(tasks, int) else most
        for tasks in (theirs.get("tasks"), experiment.tasks)
    )
    if few != own_few:
        changed.append("tasks")
    if changed:
        raise InputError(
            f"{folder} has searched with another {', '.join(changed)}; "
            "give the folder of a comparison with the same"
        )
    taken = {
        label: tried
        for label, tried in read_search(folder).items()
        if len(tried) == len(CANDIDATES[label])
    }
    own = read_search(experiment.output)
    if any(own.get(label, tried) != tried for label, tried in taken.items()):
        raise InputError(f"{experiment.output} has its own search; leave out --search-from")
    write_json(experiment.output / "search.json", own | taken)


def search_rates(
    experiment: Experiment, stream: Stream, tasks: tuple[StreamTask, ...]
) -> dict[str, dict[str, Any]]:
    """Returns the best candidate of each arm that has some, by Average on validation images.

    Scores are recorded in `search.json`; those that are there are not measured again.

    Args:
        experiment: names the arms.
        stream: `packaged`.
        tasks: the stream's; the first `search_tasks` of them are learned.
    """
    record = read_search(experiment.output)
    some = tuple(replace(t, test=t.val) for t in tasks[: experiment.search_tasks])
    wanted = {ARMS[label].rate for label in experiment.arms} - {""}
    for label in filter(wanted.__contains__, CANDIDATES):
        scores = record.setdefault(label, [])
        for number, candidate in enumerate(CANDIDATES[label]):
            if number < len(scores):
                continue
            folder = experiment.folder(f"search-{label}-{number}", 0)
            method, changes = _built(experiment, stream, label, candidate)
            run = ContinualRun(folder, method, recipe_of(stream, changes, 0))
            report = learn_tasks(run, load_clip("tiny"), some)
            average = report["metrics"]["average"]["value"]
            scores.append(Tried(**candidate, average=average))
            write_json(experiment.output / "search.json", record)
    best = {label: max(scores, key=lambda one: one.average) for label, scores in record.items()}
    return {label: one.options for label, one in best.items()}


def run_one(
    experiment: Experiment, stream: Stream, label: str, seed: int,
    chosen: Mapping[str, dict[str, Any]], tasks: tuple[StreamTask, ...], outside: StreamTask,
) -> None:  # fmt: skip
    """Trains one arm with one seed and writes its report, unless that is there.

    Args:
        experiment: names the folders.
        stream: of the tasks.
        label: name of the arm.
        seed: of the run.
        chosen: what `search_rates` found.
        tasks: what is learned, in order.
        outside: what retention is measured on.
    """
    folder = experiment.folder(label, seed)
    if read_report(folder) is not None:
        return
    arm = ARMS[label]
    candidate: dict[str, Any] = {}
    if arm.rate:
        tuned = arm.rate == label
        candidate = dict(chosen[arm.rate]) if tuned else {"lr": chosen[arm.rate]["lr"]}
    follows: dict[str, Any] = (
        {arm.follows: experiment.folder("codyra", seed)} if arm.follows else {}
    )
    method, changes = _built(experiment, stream, label, candidate | follows)
    run = ContinualRun(folder, method, recipe_of(stream, changes, seed))
    report = learn_tasks(run, load_clip("tiny"), tasks, [outside])
    write_json(folder / "report.json", report)


def _built(
    experiment: Experiment, stream: Stream, label: str, candidate: Mapping[str, Any]
) -> tuple[Method, dict[str, Any]]:
    """Returns the method of an arm, and what changes in the recipe, for a candidate.

    Args:
        experiment: its sizes.
        stream: that is learned.
        label: of the arm.
        candidate: options of the method, and perhaps `lr`.
    """
    options = dict(candidate)
    changes: dict[str, Any] = {"steps": experiment.steps, "batch": experiment.batch}
    if "lr" in options:
        changes["lr"] = options.pop("lr")
    arm = ARMS[label]
    method = method_of(stream, arm.method, {**arm.options, **options}, experiment.steps)
    return method, changes
