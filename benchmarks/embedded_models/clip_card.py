"""The embedded CLIP's model card: zero-shot and fine-tuned accuracy of every domain."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from vlm_prune.benchmarks.stats.table import as_markdown, percent_interval
from vlm_prune.continual.clip import Clip, load_clip
from vlm_prune.continual.config import Recipe
from vlm_prune.continual.evaluate import evaluate_tasks
from vlm_prune.continual.methods.full import FullFineTune
from vlm_prune.continual.metrics import mean_accuracy, retention
from vlm_prune.continual.streams.base import Labeled, StreamTask
from vlm_prune.continual.streams.packaged import DOMAINS, packaged, task
from vlm_prune.continual.streams.stream import labels_of
from vlm_prune.continual.train import ContinualRun, train_tasks

RATES = (1e-4, 3e-4, 1e-3)
STEPS = 60
Figure = tuple[float, float, float]
HEAD = """# Tiny CLIP

An open_clip model for tests and examples of continual learning: 48 px images, {parameters:.2f} M
parameters, pre-trained on a CPU by `scripts/train_tiny_clip.py` (`recipe.json`,
`log.jsonl`) on captions of drawn pictures. Training takes the recipe's first `stop` steps of a
schedule of `steps`. It has seen {known} of the packaged stream's {classes}
classes, in the plain style only; the stream's images are in the varied style (other fonts, turned,
tinted). It knows nothing else, and is of no use on photographs of the world.

Accuracy in % on the test split, among a domain's own classes, with the 95 % bootstrap interval over
its images; one seed. Fine-tuning trains all weights for {steps} steps on the domain's {train} training
images per class, at the rate that is best on `val`; the gain is paired by image. `scenes` is outside
the stream.

"""
COLUMNS = (
    "domain", "classes (seen)", "chance", "zero-shot", "zero-shot, seen classes", "fine-tuned", "gain",
)  # fmt: skip


@dataclass(frozen=True)
class Figures:
    """Accuracy with its interval, among a domain's own classes."""

    zero_shot: Figure
    known: Figure
    tuned: Figure
    gain: Figure


def right_images(clip: Clip, split: Sequence[Labeled], one: StreamTask) -> NDArray[np.uint8]:
    """Classifies the images of a split among their task's classes; returns which are right, (n,).

    Args:
        clip: the model.
        split: n labeled images.
        one: the task with their classes.
    """
    return evaluate_tasks(clip, [replace(one, test=split)], Recipe())[0].numpy()


def measure_domain(clip: Clip, one: StreamTask, steps: int = STEPS) -> Figures:
    """Measures the accuracy of one domain, before and after a copy is fine-tuned on it.

    Args:
        clip: stays as it is.
        one: the domain's task.
        steps: of fine-tuning.
    """
    before, after = right_images(clip, one.test, one), fine_tuned(clip, one, steps)
    labels = np.array(labels_of(one.test))
    seen = np.isin(labels, [one.classes.index(name) for name in DOMAINS[one.name].known])
    change = retention(before, after)
    low, high = change["ci"]
    return Figures(
        mean_accuracy(before),
        mean_accuracy(before[seen]),
        mean_accuracy(after),
        (change["difference"], low, high),
    )


def fine_tuned(clip: Clip, one: StreamTask, steps: int) -> NDArray[np.uint8]:
    """Fine-tunes a copy at each of `RATES`; returns the test hits, (n,), of the one best on `val`.

    Args:
        clip: stays as it is.
        one: the domain's task.
        steps: of each fine-tuning.
    """
    found = []
    for rate in RATES:
        copy = replace(clip, model=deepcopy(clip.model))
        recipe = Recipe(steps=steps, batch=32, lr=rate)
        with TemporaryDirectory() as folder:
            train_tasks(ContinualRun(Path(folder), FullFineTune(), recipe, cpu=True), copy, [one])
        found.append((right_images(copy, one.val, one).mean(), right_images(copy, one.test, one)))
    return max(found, key=lambda pair: pair[0])[1]


def write_card(folder: Path, figures: dict[str, Figures] | None = None) -> None:
    """Measures every domain with the weights in `folder` and writes `README.md` there."""
    clip = load_clip(str(folder))
    tasks = [*packaged(), task("scenes")]
    if figures is None:
        figures = {one.name: measure_domain(clip, one) for one in tasks}
    stream = packaged()
    head = HEAD.format(
        parameters=sum(p.numel() for p in clip.model.parameters()) / 1e6,
        known=sum(len(DOMAINS[one.name].known) for one in stream),
        classes=sum(len(one.classes) for one in stream),
        train=len(stream[0].train) // len(stream[0].classes),
        steps=STEPS,
    )
    rows: list[Sequence[object]] = [COLUMNS]
    for one in tasks:
        count, seen, found = len(one.classes), len(DOMAINS[one.name].known), figures[one.name]
        cells = (
            percent_interval(value, interval)
            for value, *interval in (found.zero_shot, found.known, found.tuned, found.gain)
        )
        rows.append([one.name, f"{count} ({seen})", f"{100 / count:.1f}", *cells])
    (folder / "README.md").write_text(head + as_markdown(rows))
