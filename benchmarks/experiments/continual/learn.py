"""One method on one stream: train, then write what it did as a table, a picture and JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_prune.benchmarks.evaluation.environment import command_line, versions
from vlm_prune.continual.attention import sites, split
from vlm_prune.continual.clip import DEFAULT, Clip, load_clip
from vlm_prune.continual.config import Recipe, above, check_options
from vlm_prune.continual.delta import Delta
from vlm_prune.continual.diagnostics import draw_ranks
from vlm_prune.continual.evaluate import evaluate_tasks
from vlm_prune.continual.methods import Method, make_method
from vlm_prune.continual.metrics import AccuracyMatrix, retention
from vlm_prune.continual.parallel import rank_and_world
from vlm_prune.continual.prox import total_shrinkage
from vlm_prune.continual.results import StreamResults, read_results
from vlm_prune.continual.streams import EMBEDDED, Stream, StreamTask, open_stream, write_indices
from vlm_prune.continual.streams.base import readable_indices
from vlm_prune.continual.streams.packaged import DOMAINS, Drawn
from vlm_prune.continual.streams.stream import Subset, labels_of
from vlm_prune.continual.streams.unseen import UNSEEN
from vlm_prune.continual.train import ContinualRun, accelerator_of, train_tasks
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.files import write_json
from vlm_prune.vlm.common.paths import DataRoot

EMBEDDED_RECIPE = Recipe(steps=60, batch=32, lr=3e-3)
# data sets that are in none of the stream's tasks
OUTSIDE = {
    "packaged": ("scenes",),
    "redrawn": ("scenes",),
    "x-tail": ("cifar100", "places365", "imagenet"),
    "mtil-1": ("places365", "imagenet"),
    "mtil-2": ("places365", "imagenet"),
    "mtil-5shot": ("places365", "imagenet"),
    "cifar100-10": ("places365", "imagenet"),
}


@dataclass(frozen=True)
class Learning:
    """Settings of one run.

    Args:
        output: folder of the run; a killed run goes on there.
        stream: name of a stream.
        data_root: folder of its data sets; embedded streams need none.
        model: what `load_clip` reads, with `pretrained`; None is the embedded CLIP for embedded
            streams, and OpenAI's ViT-B/16 for the others.
        method: name of a continual learner, with its `options`.
        recipe: fields of `Recipe` that differ from the stream's default.
        seed: of the shots, batches and initial weights.
        save_every: steps between checkpoints within a task.
        test_per_class: test images of each class; None for all.
        shots: training images per class; None is what the stream is published with.
        skip_bad: leave out images that cannot be read.
        retention: data sets in `UNSEEN` that show what is forgotten outside of the stream; None for
            all that are no task of the stream, as far as their files are there.
        allow_outside: whether data may name files outside of `data_root`.
        workers: processes that load images.
        recompute: compute activations again in the backward pass, to save memory.

    Raises:
        InputError: if open_clip's model has no weights named, or no test image is left.
    """

    output: Path
    stream: str = "packaged"
    data_root: Path = Path(".")
    model: str | None = None
    pretrained: str | None = None
    method: str = "codyra"
    options: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    seed: int = 8
    save_every: int = 50
    test_per_class: int | None = None
    shots: int | None = None
    skip_bad: bool = False
    retention: tuple[str, ...] | None = None
    allow_outside: bool = False
    workers: int = 0
    recompute: bool = False

    def __post_init__(self) -> None:
        name, weights = self.clip
        if weights is None and not (name == "tiny" or "/" in name or Path(name).is_dir()):
            raise InputError(f"model {name!r} needs weights; give pretrained, such as openai")
        if self.test_per_class is not None:
            above("test_per_class", self.test_per_class, 1)

    @property
    def clip(self) -> tuple[str, str | None]:
        """Returns the names of the model and of its weights."""
        if self.model is not None:
            return self.model, self.pretrained
        return ("tiny", None) if self.stream in EMBEDDED else DEFAULT


def recipe_of(stream: Stream, changes: dict[str, Any], seed: int) -> Recipe:
    """Returns the stream's default recipe with some fields changed.

    Classes are joined, and prompts ensembled, as the stream has them.

    Args:
        stream: decides the defaults.
        changes: values of fields of `Recipe`.
        seed: of the run.

    Raises:
        InputError: for an unknown field, or a value of another kind or out of range.
    """
    check_options(Recipe, "the recipe", changes)
    base = EMBEDDED_RECIPE if stream.name in EMBEDDED else Recipe()
    base = replace(
        base, joint=stream.joint, seen_only=stream.seen_only, ensemble=stream.ensemble, seed=seed
    )
    return replace(base, **changes)


def method_of(
    stream: Stream, name: str, options: dict[str, Any], steps: int = EMBEDDED_RECIPE.steps
) -> Method:
    """Makes a method with what embedded streams need by default.

    Short tasks keep the strength of CoDyRA's published schedule, and ZSCL's reference images are
    pre-training drawings of `scenes`, which belong to no task.

    Args:
        stream: decides the defaults.
        name: of a continual learner.
        options: of it; they go before the defaults.
        steps: of each task; ZSCL's average takes up weights every five, or once in shorter ones.

    Raises:
        InputError: for an unknown method or option.
    """
    defaults: dict[str, Any] = {}
    if stream.name in EMBEDDED and name == "codyra" and "kappa" not in options:
        defaults["total"] = total_shrinkage(500, 0.5, 0.005)
    if stream.name in EMBEDDED and name == "zscl":
        domain = DOMAINS["scenes"]
        drawn = Drawn(domain, "pretraining", domain.known, "plain")
        defaults["images"] = [drawn[k][0] for k in range(256)]
        defaults["average_every"] = min(5, steps)  # its default is longer than these tasks
        defaults["captions"] = [domain.templates[0].format(c) for c in domain.classes]
    return make_method(name, **(defaults | options))


def learn(settings: Learning) -> dict[str, Any]:
    """Trains, or finishes training; writes `report.json`, `matrix.png`
    and, of pruned ranks, `ranks`.

    Raises:
        InputError: if a name is unknown, data are missing, or the folder holds another run.
    """
    root = DataRoot(settings.data_root, settings.allow_outside)
    stream = open_stream(settings.stream, root, settings.seed, settings.shots, settings.skip_bad)
    recipe = recipe_of(stream, settings.recipe, settings.seed)
    method = method_of(stream, settings.method, settings.options, recipe.steps)
    tasks = tuple(fewer(task, settings.test_per_class) for task in stream.tasks)
    outside, missing = outside_of(settings, stream)
    clip = load_clip(*settings.clip)
    run = ContinualRun(
        settings.output, method, recipe, settings.save_every, settings.workers,
        progress=True, recompute=settings.recompute,
    )  # fmt: skip
    report = learn_tasks(run, clip, tasks, outside)
    about = {"stream": stream.name, "model": settings.clip[0], "command": command_line()}
    report = about | report | {"versions": versions("open_clip_torch", "timm", "peft")}
    report["retention"] |= {name: {"missing": reason} for name, reason in missing.items()}
    if rank_and_world()[0] == 0:
        if any(isinstance(task.train, Subset) for task in stream.tasks):
            write_indices(stream, settings.output / "indices.json")
        write_json(settings.output / "report.json", report)
        accuracy_matrix(read_results(run.output)).heat_map(settings.output / "matrix.png")
        picture_ranks(settings.output)
    return report


def outside_of(settings: Learning, stream: Stream) -> tuple[list[StreamTask], dict[str, str]]:
    """Returns the data sets of `settings.retention`, and of those that are not there the reason.

    Raises:
        InputError: if one that was asked for is unknown, missing, or a task of the stream.
    """
    found, missing = list[StreamTask](), dict[str, str]()
    given = settings.retention
    for name in OUTSIDE[settings.stream] if given is None else given:
        if name in {task.name for task in stream.tasks}:
            raise InputError(f"{name} is a task of {stream.name}; give another retention")
        read = UNSEEN[name]
        try:
            root = DataRoot(settings.data_root, settings.allow_outside)
            task = fewer(read(root), settings.test_per_class)
        except InputError as error:
            if given is not None:
                raise
            missing[name] = str(error)
            continue
        if settings.skip_bad:
            task = replace(task, test=Subset(task.test, readable_indices(task.test)))
        found.append(task)
    return found, missing


def picture_ranks(folder: Path) -> None:
    """Draws how many components each task kept, module by layer, where some were dropped."""
    paths = sorted((folder / "deltas").glob("*.safetensors"))
    deltas = [Delta.load(path) for path in paths]
    dropped = any(f.rank < len(f.start) for delta in deltas for f in delta.factors.values())
    if not dropped:
        return
    model = load_clip(str(folder / "model")).model
    split(model)
    (folder / "ranks").mkdir(exist_ok=True)
    for path, delta in zip(paths, deltas, strict=True):
        name = delta.facts.get("name", path.stem)
        draw_ranks(delta, sites(model), folder / "ranks" / f"{name}.png")


def fewer(task: StreamTask, test_per_class: int | None) -> StreamTask:
    """Returns the task with the first test images of each class; None takes all of them."""
    if test_per_class is None:
        return task
    labels = np.array(labels_of(task.test))
    first = [np.flatnonzero(labels == k)[:test_per_class] for k in range(len(task.classes))]
    return replace(task, test=Subset(task.test, np.sort(np.concatenate(first)).tolist()))


def learn_tasks(
    run: ContinualRun, clip: Clip, tasks: Sequence[StreamTask], outside: Sequence[StreamTask] = ()
) -> dict[str, Any]:
    """Trains on tasks, measures what is left outside of them, and returns a report of numbers.

    The outside tasks are scored by the model alone, each among its own classes.

    Args:
        run: folder, method and recipe.
        clip: trained in place.
        tasks: what is learned, in order.
        outside: what retention is measured on.

    Raises:
        InputError: as `train_tasks` does.
    """
    clip.model.to(accelerator_of(run).device)
    before = [hits_of(clip, task, run.recipe) for task in outside]
    results = train_tasks(run, clip, tasks)
    final = load_clip(str(run.output / "model"))
    final.model.to(clip.device)
    return {
        "method": run.method.name,
        "seed": run.recipe.seed,
        "recipe": asdict(run.recipe),
        **accuracy_matrix(results).to_json(),
        "trainable_parameters": results.trainable,
        "added_parameters": results.added,
        "added_bytes": results.added_bytes,
        "update_norms": results.norms,
        "drift": results.drift,
        "retention": {
            task.name: retention(hits, hits_of(final, task, run.recipe))
            for task, hits in zip(outside, before, strict=True)
        },
    }


def hits_of(clip: Clip, task: StreamTask, recipe: Recipe) -> NDArray[np.uint8]:
    """Classifies the test images of one task among its own classes; returns which are right, (n,).

    Args:
        clip: the model.
        task: the images with their classes.
        recipe: of the evaluation; the zero-shot ensemble is left out.
    """
    alone = replace(recipe, joint=False, ensemble=False)
    found: NDArray[np.uint8] = evaluate_tasks(clip, [task], alone)[0].numpy()
    return found


def accuracy_matrix(results: StreamResults) -> AccuracyMatrix:
    """Returns the results with their metrics."""
    hits = tuple(results.hits), tuple(results.zero_shot_hits)
    return AccuracyMatrix(tuple(results.tasks), *hits)


def retention_line(name: str, left: Mapping[str, Any]) -> str:
    """Returns one data set of a report's retention as a line of text, in per cent."""
    if "missing" in left:
        return f"retention on {name} was not measured: {left['missing']}"
    before, after, low, high = (100 * v for v in (left["before"], left["after"], *left["ci"]))
    change = f"{after - before:+.1f} [{low:+.1f}, {high:+.1f}]"
    return f"retention on {name}: {before:.1f} -> {after:.1f} ({change})"
