"""Training and test rows: many questions per pass over an image's frozen tower features."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlm_prune.benchmarks.embedded_models.curriculum import (
    LESSONS,
    ChatFormat,
    text_row,
    visual_row,
)
from vlm_prune.benchmarks.embedded_models.language import Row, vision_transformer
from vlm_prune.benchmarks.embedded_models.source import SceneExample, pixels_of
from vlm_prune.benchmarks.embedded_models.tower import tower_features
from vlm_prune.benchmarks.experiments.forgetting.arms import Plan
from vlm_prune.benchmarks.tasks import VISUAL, iit, text
from vlm_prune.benchmarks.tasks.base import SPLITS, Split
from vlm_prune.benchmarks.tasks.scenes import Scene, make_scene
from vlm_prune.vlm.common.files import atomic_path

KEY = 2_026_11_24
TASK_QUESTIONS, SETTING_QUESTIONS, TEXT_QUESTIONS = 2, 4, 12


@dataclass
class Shown:
    """Scenes of a split with their tower features, and how questions about them are written.

    Args:
        scenes: of the split.
        features: (scenes, 576, width) in half precision.
        chat: of the model that is asked.
    """

    scenes: list[Scene]
    features: Tensor
    chat: ChatFormat

    def triples(self) -> Tensor:
        """Returns name, color and place of each patch,
        (scenes * 576, 3), as `Symbols` takes them.
        """
        return torch.cat([SceneExample(scene).triples for scene in self.scenes])


@torch.no_grad()
def encode_scenes(model: Any, processor: Any, split: Split, number: int, folder: Path) -> Shown:
    """Returns the first scenes of a split; features are kept in `folder`,
    since every arm has this tower.

    Args:
        model: with the tower.
        processor: the model's, with its chat template.
        split: of the scenes.
        number: of scenes.
        folder: of the features.
    """
    rng = np.random.default_rng([KEY, SPLITS.index(split)])
    scenes = [make_scene(rng, split) for _ in range(number)]
    path = folder / f"features-{split}-{number}.safetensors"
    if not path.is_file():
        parts = [
            tower_features(vision_transformer(model), pixels_of(scenes[k : k + 8])).half()
            for k in range(0, number, 8)
        ]
        with atomic_path(path) as partial:
            save_file({"features": torch.cat(parts)}, partial)
    return Shown(scenes, load_file(path)["features"], ChatFormat.of(processor))


def training_rows(shown: Shown, plan: Plan, replay: bool, rng: np.random.Generator) -> list[Row]:
    """Draws the rows of one step: questions about images, and `plan.replay` of them about text.

    Args:
        shown: training scenes.
        plan: sizes.
        replay: whether there are questions about text.
        rng: draws scenes, patches and questions.
    """
    rows = []
    for k in rng.integers(len(shown.scenes), size=plan.images):
        scene, features = shown.scenes[k], some(shown, k, plan, rng)
        rows.append(visual_row(rng, scene, features, plan.questions, "sight", shown.chat))
    if replay:
        wanted = max(1, round(plan.images * plan.questions * plan.replay / (1 - plan.replay)))
        row = text_row(rng, wanted, shown.chat)
        row.blocks = row.blocks[:wanted]
        rows.append(row)
    return rows


def some(shown: Shown, k: int, plan: Plan, rng: np.random.Generator) -> Tensor:
    """Returns features of a scene's objects and of random other patches, `plan.patches` in all, in
    reading order.

    Args:
        shown: scenes with their features.
        k: number of the scene.
        plan: sizes.
        rng: draws the other patches.
    """
    names = shown.scenes[k].patch_names.ravel()
    objects, others = np.flatnonzero(names), np.flatnonzero(names == 0)
    more = rng.permutation(others)[: max(0, plan.patches - len(objects))]
    return shown.features[k][torch.from_numpy(np.sort(np.concatenate([objects, more])))]


def held_out_rows(shown: Shown, plan: Plan, rng: np.random.Generator) -> list[tuple[str, Row]]:
    """Draws rows, each with the part that it measures: `visual`, `text`, or `iit`.

    Each scene is shown once for the six tasks and the setting V, and once each for T,V and T,T,V;
    text has as many rows. A block's kind is its task or setting.

    Args:
        shown: scenes of the split.
        plan: sizes.
        rng: draws patches and questions.
    """
    rows: list[tuple[str, Row]] = []
    chat = shown.chat
    for k, scene in enumerate(shown.scenes):
        features = some(shown, k, plan, rng)
        by_task = [
            (name, question)
            for name in VISUAL
            for _ in range(TASK_QUESTIONS)
            if (question := LESSONS["all"][name][0](rng, scene)) is not None
        ]
        rows.append(("visual", Row(chat.first, [chat.block(k, q) for k, q in by_task], features)))
        for setting in ("V", "T,V", "T,T,V"):
            before = chat.before(rng, setting.count("T"))
            questions = [iit.ask_about_scene(rng, scene) for _ in range(SETTING_QUESTIONS)]
            rows.append(("iit", Row(before, [chat.block(setting, q) for q in questions], features)))
        text_questions = [text.ask(rng) for _ in range(TEXT_QUESTIONS)]
        before = chat.before(rng, plan.earlier_turns)
        rows.append(("text", chat.text_row(before, [(q.subset, q) for q in text_questions])))
        for setting in ("T", "T,T", "T,T,T"):
            before = chat.before(rng, setting.count("T") - 1)
            questions = [text.ask(rng) for _ in range(SETTING_QUESTIONS)]
            rows.append(("iit", chat.text_row(before, [(setting, q) for q in questions])))
    return rows


def shift_rows(shown: Shown, plan: Plan, rng: np.random.Generator) -> list[Row]:
    """Draws prompts with an image between a text turn and a question, for the attention shift.

    Args:
        shown: scenes of the split.
        plan: sizes.
        rng: draws patches and questions.
    """
    rows = []
    for n in range(plan.shift_rows):
        k = n % len(shown.scenes)
        before = shown.chat.before(rng, 1)
        question = iit.ask_about_scene(rng, shown.scenes[k])
        rows.append(Row(before, [shown.chat.block("shift", question)], some(shown, k, plan, rng)))
    return rows
