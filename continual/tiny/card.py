"""The embedded CLIP's model card: zero-shot and linear-probe accuracy of every domain."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlm_prune.continual.clip import Clip, load_clip
from vlm_prune.continual.data import eval_batches
from vlm_prune.continual.evaluate import class_features
from vlm_prune.continual.metrics import accuracy
from vlm_prune.continual.streams.base import Labelled, Task
from vlm_prune.continual.streams.packaged import DOMAINS, packaged, task

STRENGTHS = (1.0, 10.0, 100.0, 1000.0)
Figure = tuple[float, float, float]
HEAD = """# Tiny CLIP

An open_clip model for tests and examples of continual learning: 48 px images, {parameters:.2f} M
parameters, pre-trained on a CPU by `scripts/train_tiny_clip.py` (`recipe.json`,
`log.jsonl`) on captions of drawn pictures. Training takes the recipe's first `stop` steps of a
schedule of `steps`. It has seen {known} of the packaged stream's {classes}
classes, in the plain style only; the stream's images are in the varied style (other fonts, turned,
tinted). It knows nothing else, and is of no use on photographs of the world.

Accuracy in % on the test split with the 95 % bootstrap interval over its images; one seed.
Zero-shot and the linear probe choose among a domain's own classes. The probe is logistic
regression on frozen image features of the {train} training images per class, its strength chosen on
`val`. `scenes` is outside the stream.

| domain | classes (seen) | chance | zero-shot | zero-shot, seen classes | linear probe |
|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Figures:
    """Accuracy with its interval, among a domain's own classes."""

    zero_shot: Figure
    known: Figure
    probe: Figure


@torch.no_grad()
def image_features(clip: Clip, split: Sequence[Labelled]) -> tuple[Tensor, Tensor]:
    """Unit features (n, d) and labels (n,) of a split."""
    batches = list(eval_batches(split, clip, 128))
    features = [clip.encode_image(pixels) for pixels, _ in batches]
    return torch.cat(features), torch.cat([labels for _, labels in batches])


def measure(clip: Clip, one: Task) -> Figures:
    """Zero-shot and linear-probe accuracy of one domain."""
    test, labels = image_features(clip, one.test)
    hits = (test @ class_features(clip, one, ensemble=False).T).argmax(1) == labels
    known = torch.tensor([name in DOMAINS[one.name].known for name in one.classes])
    train, val = (image_features(clip, split) for split in (one.train, one.val))
    probe = _probe(train, val, (test, labels))
    seen = hits[known[labels]]
    return Figures(accuracy(hits.numpy()), accuracy(seen.numpy()), accuracy(probe))


def write_card(folder: Path, figures: dict[str, Figures] | None = None) -> None:
    """Measure every domain with the weights in `folder` and write `README.md` there."""
    clip = load_clip(str(folder))
    tasks = [*packaged(), task("scenes")]
    if figures is None:
        figures = {one.name: measure(clip, one) for one in tasks}
    stream = packaged()
    head = HEAD.format(
        parameters=sum(p.numel() for p in clip.model.parameters()) / 1e6,
        known=sum(len(DOMAINS[one.name].known) for one in stream),
        classes=sum(len(one.classes) for one in stream),
        train=len(stream[0].train) // len(stream[0].classes),
    )
    rows = []
    for one in tasks:
        count, seen, found = len(one.classes), len(DOMAINS[one.name].known), figures[one.name]
        cells = (_cell(f) for f in (found.zero_shot, found.known, found.probe))
        rows.append(
            f"| {one.name} | {count} ({seen}) | {100 / count:.1f} | {' | '.join(cells)} |\n"
        )
    (folder / "README.md").write_text(head + "".join(rows))


def _probe(
    train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]
) -> NDArray[np.bool_]:
    """Test hits of logistic regression whose strength is chosen on `val`."""
    from sklearn.linear_model import LogisticRegression

    best, hits = -1.0, np.zeros(0, bool)
    for strength in STRENGTHS:
        model = LogisticRegression(C=strength, max_iter=2000).fit(*(t.numpy() for t in train))
        score = float(model.score(*(t.numpy() for t in val)))
        if score > best:
            best, hits = score, model.predict(test[0].numpy()) == test[1].numpy()
    return hits


def _cell(figure: Figure) -> str:
    value, low, high = (100 * v for v in figure)
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"
