"""Training scenes, and what the embedded model learns from them: pixels, patches, rows and text."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from vlm_prune.benchmarks.embedded_models.curriculum import (
    described_scene_row,
    recite_row,
    story_row,
    text_row,
    visual_questions,
    visual_row,
)
from vlm_prune.benchmarks.embedded_models.language import Lesson, Row
from vlm_prune.benchmarks.embedded_models.tower import PatchBatch
from vlm_prune.benchmarks.tasks import text
from vlm_prune.benchmarks.tasks.scenes import (
    COLORS,
    GRID,
    NAMES,
    PATCH,
    SHARES,
    Scene,
    Shares,
    make_scene,
)

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
TRAIN_SEED = 1_000_003


def normalized(pixels: "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]") -> Tensor:
    """Returns uint8 images (B, H, W, 3) as CLIP's preprocessing leaves them, (B, 3, H, W)."""
    mean, std = torch.tensor(CLIP_MEAN).view(3, 1, 1), torch.tensor(CLIP_STD).view(3, 1, 1)
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - mean) / std


def pixels_of(shown: list[Scene]) -> Tensor:
    """Returns the normalized pixels of scenes, (B, 3, 336, 336)."""
    return normalized(np.stack([scene.pixels for scene in shown]))


def scenes(*key: int, things: int | None = None, shares: Shares = SHARES) -> Iterator[Scene]:
    """Yields training scenes without end.

    Args:
        key: seeds of the stream.
        things: objects of each scene; a random number for None.
        shares: of the kinds of object.
    """
    rng = np.random.default_rng([TRAIN_SEED, *key])
    while True:
        yield make_scene(rng, "train", things, shares)


def windows(source: Iterator[Scene], seed: int, batch: int, side: int) -> Iterator[PatchBatch]:
    """Yields batches of square windows of scenes, two around each object.

    Args:
        source: of the scenes.
        seed: of the windows' corners.
        batch: windows per batch.
        side: patches per side.
    """
    rng = np.random.default_rng([TRAIN_SEED, seed, 1])
    grid = np.arange(GRID * GRID).reshape(GRID, GRID)
    cuts: list[tuple[Scene, int, int]] = []
    while True:
        while len(cuts) < batch:
            scene = next(source)
            for thing in 2 * scene.things:
                corner = np.array([thing.y, thing.x]) // PATCH - rng.integers(1, side - 1, 2)
                row, left = (int(v) for v in np.clip(corner, 0, GRID - side))
                cuts.append((scene, row, left))
        drawn, cuts = cuts[:batch], cuts[batch:]
        cells = [(s, slice(r, r + side), slice(c, c + side)) for s, r, c in drawn]
        pixels = [
            s.pixels[r * PATCH : (r + side) * PATCH, c * PATCH : (c + side) * PATCH]
            for s, r, c in drawn
        ]
        yield PatchBatch(
            normalized(np.stack(pixels)),
            torch.from_numpy(np.stack([grid[r, c].ravel() for _, r, c in cells])),
            torch.from_numpy(np.stack([s.patch_names[r, c].ravel() for s, r, c in cells])),
            torch.from_numpy(np.stack([s.patch_colors[r, c].ravel() for s, r, c in cells])),
        )


def whole_scenes(seed: int, batch: int) -> Iterator[PatchBatch]:
    """Yields batches of whole scenes."""
    source = scenes(seed, things=6)
    cells = torch.arange(GRID * GRID).expand(batch, -1)
    while True:
        drawn = [next(source) for _ in range(batch)]
        yield PatchBatch(
            pixels_of(drawn),
            cells,
            torch.from_numpy(np.stack([s.patch_names.ravel() for s in drawn])),
            torch.from_numpy(np.stack([s.patch_colors.ravel() for s in drawn])),
        )


def tokenizer_texts(lines: int = 4000) -> Iterator[str]:
    """Yields text for the tokenizer: every kind of question and answer."""
    rng = np.random.default_rng(TRAIN_SEED)
    source = scenes(0)
    for _ in range(lines // 20):
        for _, question in visual_questions(rng, next(source), 10):
            yield f"USER: \n{question.text} ASSISTANT: {question.answer}"
        for _ in range(10):
            question = text.ask(rng)
            yield f"USER: {question.text} ASSISTANT: {question.answer}"
    for name in (*NAMES, *COLORS):
        yield f" {name}"


class SceneExample:
    """A training scene as `vlm_prune.benchmarks.embedded_models.llava` takes it."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene

    @property
    def pixels(self) -> Tensor:
        """Returns the scene as the tower takes it, (3, 336, 336)."""
        return pixels_of([self.scene])[0]

    @property
    def triples(self) -> Tensor:
        """Returns name, color and token index of each patch, (576, 3)."""
        labels = (self.scene.patch_names.ravel(), self.scene.patch_colors.ravel())
        return torch.from_numpy(np.stack([*labels, np.arange(GRID * GRID)], 1))

    def row(self, image: Tensor, questions: int, lesson: Lesson, seed: int) -> Row:
        rng = np.random.default_rng([TRAIN_SEED, seed])
        return visual_row(rng, self.scene, image, questions, lesson)


class SceneSource:
    """Everything the embedded model is trained on, drawn from one seed."""

    names = NAMES
    colors = tuple(COLORS)

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def windows(self, batch: int, side: int, written: bool) -> Iterator[PatchBatch]:
        """Yields windows of any scenes, or of `written` ones: mostly
        digits, the hardest to read.
        """
        if written:
            source = scenes(self.seed, 3, things=6, shares=(0.1, 0.7, 0.2))
        else:
            source = scenes(self.seed, things=6)
        return windows(source, self.seed, batch, side)

    def whole(self, batch: int, part: int) -> Iterator[PatchBatch]:
        return whole_scenes(self.seed + 100 * (part + 1), batch)

    def examples(self, number: int, things: int | None) -> list[SceneExample]:
        """Draws `number` scenes of `things` objects, or of any number for None."""
        source = scenes(self.seed + (things or 0) + 1, things=things)
        return [SceneExample(next(source)) for _ in range(number)]

    def text(self, questions: int, seed: int) -> Row:
        rng = np.random.default_rng([TRAIN_SEED, seed])
        return (text_row if rng.random() < 0.5 else story_row)(rng, questions)

    def prose(self, questions: int, seed: int) -> Row:
        """Makes a row of any kind of text, for a language model that sees nothing else."""
        rng = np.random.default_rng([TRAIN_SEED, seed])
        makers = (recite_row, text_row, story_row, described_scene_row)
        return makers[int(rng.choice(4, p=(0.2, 0.35, 0.15, 0.3)))](rng, questions)
